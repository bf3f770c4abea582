"""Micro-batches on all cores: one thread each, with single-threaded arithmetic inside.

Small matrix products gain little from being split over cores, and lose a hundredfold when two jobs share them
with threads that wait by spinning. Whole micro-batches side by side keep every core busy instead, and since
each is computed by one thread and they are added up in order, the result does not depend on the cores.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from fedlora.models import Base
from fedlora.threads import one_thread

Work = TypeVar("Work")
Result = TypeVar("Result")


class Workers:
    """As many threads as torch would use on the CPU; none for a model on a GPU. For use in a `with` block."""

    def __init__(self, base: Base) -> None:
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if base.device.type == "cpu" and self._threads > 1:  # the caller's own thread is one of them
            self._pool = ThreadPoolExecutor(self._threads - 1, "fedlora", torch.set_num_threads, (1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[Work], Result], items: Sequence[Work]) -> list[Result]:
        """The results in the order of the items.

        Work may call this in its turn. Its items then go to cores that have nothing else to do, and what none
        has begun the caller does: no thread waits for one that waits for it.
        """
        if self._pool is None:
            return [work(item) for item in items]
        with one_thread():
            others = [self._pool.submit(work, item) for item in items[1:]]
            found = [work(item) for item in items[:1]]
            for item, other in zip(items[1:], others, strict=True):
                found.append(work(item) if other.cancel() else other.result())
            return found
