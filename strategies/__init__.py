"""One file, one published algorithm. `fedlora run strategy=NAME` takes the names in lower case."""

if __name__ != "fedlora.strategies":
    raise ModuleNotFoundError(
        "import fedlora.strategies, not strategies: this folder is installed inside the fedlora package"
    )

from .fedit import FedIT
from .ffalora import FFALoRA
from .flexlora import FlexLoRA

__all__ = ["FFALoRA", "FedIT", "FlexLoRA"]
