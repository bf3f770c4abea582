"""One file, one local rule: what bends a client's training away from the mean loss of its rows."""

from fedlora.training.rules.base import LocalRule
from fedlora.training.rules.fedprox import FedProx
from fedlora.training.rules.rank_pruning import RankPruning

__all__ = ["FedProx", "LocalRule", "RankPruning"]
