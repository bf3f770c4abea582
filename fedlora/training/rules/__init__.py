"""One file, one local rule: what bends a client's training away from the mean loss of its rows."""

from fedlora.training.rules.base import Learned, LocalRule, RoundEnd, RoundStart, ServerMemory
from fedlora.training.rules.fedprox import FedProx
from fedlora.training.rules.rank_pruning import RankPruning
from fedlora.training.rules.scaffold import Scaffold

__all__ = [
    "FedProx",
    "Learned",
    "LocalRule",
    "RankPruning",
    "RoundEnd",
    "RoundStart",
    "Scaffold",
    "ServerMemory",
]
