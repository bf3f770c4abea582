"""One file, one way to train locally."""

if __name__ != "fedlora.clients":
    raise ModuleNotFoundError(
        "import fedlora.clients, not clients: this folder is installed inside the fedlora package"
    )

from .local import LocalTraining

__all__ = ["LocalTraining"]
