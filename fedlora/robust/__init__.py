"""Rules against poisoned updates, between the clients and the strategy."""

from fedlora.robust.base import Robust
from fedlora.robust.clip import Clip
from fedlora.robust.coordinatewise import Median, TrimmedMean
from fedlora.robust.krum import Krum
from fedlora.robust.norm_bound import NormBound

__all__ = ["Clip", "Krum", "Median", "NormBound", "Robust", "TrimmedMean"]
