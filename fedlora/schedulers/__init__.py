"""When clients are asked and updates aggregated, beside `fedlora.rounds.scheduling.Synchronous`."""

from fedlora.schedulers.asynchronous import Asynchronous
from fedlora.schedulers.buffered import Buffered

__all__ = ["Asynchronous", "Buffered"]
