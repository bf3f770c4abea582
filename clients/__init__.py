"""One file, one way to train locally."""

if __name__ != "fedlora.clients":
    raise ModuleNotFoundError(
        "import fedlora.clients, not clients: this folder is installed inside the fedlora package"
    )

from .gated import GatedExperts
from .local import LocalTraining
from .poisoned import PoisonedTraining
from .sliced import SlicedTraining
from .twophase import TwoPhase

__all__ = ["GatedExperts", "LocalTraining", "PoisonedTraining", "SlicedTraining", "TwoPhase"]
