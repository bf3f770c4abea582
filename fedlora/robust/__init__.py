"""Rules against poisoned updates, between the clients and the strategy."""

from fedlora.robust.base import Krum, NormBound, Robust
from fedlora.robust.coordinatewise import Median, TrimmedMean

__all__ = ["Krum", "Median", "NormBound", "Robust", "TrimmedMean"]
