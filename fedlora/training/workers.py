"""Micro-batches on all cores: one thread each, with single-threaded arithmetic inside.

Small matrix products gain little from being split over cores, and lose a hundredfold when two jobs share them
with threads that wait by spinning. Whole micro-batches side by side keep every core busy instead, and since
each is computed by one thread and they are added up in order, the result does not depend on the cores.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Self, TypeVar

import torch

from fedlora.core.threads import one_thread
from fedlora.models import Base

Work = TypeVar("Work")
Result = TypeVar("Result")


def in_turn(work: Callable[[Work], Result], items: Sequence[Work]) -> list[Result]:
    """The results of items that are done one after the other, by the calling thread."""
    return [work(item) for item in items]


class Workers:
    """As many threads as torch would use on the CPU; none for a model on a GPU. For use in a `with` block.

    A model that writes into its own modules is fed by the caller's thread alone, with one of torch's.
    """

    def __init__(self, base: Base) -> None:
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._alone = base.traits.stateful
        self._mine = threading.local()
        if base.device.type == "cpu" and self._threads > 1 and not self._alone:
            self._pool = ThreadPoolExecutor(self._threads, "fedlora", self._begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[Work], Result], items: Sequence[Work]) -> list[Result]:
        """The results in the order of the items.

        Work may call this in its turn. Its items then go to threads that have nothing else to do, and its own
        thread does whatever none of them has begun, before it waits for the rest. So every thread is busy
        while there is work, and none waits for one that waits for it.
        """
        if self._pool is None:
            with one_thread() if self._alone else nullcontext():
                return in_turn(work, items)
        if getattr(self._mine, "thread", False):
            return self._share(self._pool, work, items)
        with one_thread():
            return [one.result() for one in [self._pool.submit(work, item) for item in items]]

    def _begin(self) -> None:
        """Make ready a thread of the pool."""
        torch.set_num_threads(1)
        self._mine.thread = True

    @staticmethod
    def _share(
        pool: ThreadPoolExecutor, work: Callable[[Work], Result], items: Sequence[Work]
    ) -> list[Result]:
        """The results of items that the calling thread of the pool does, but for those that others begin."""
        others = [pool.submit(work, item) for item in items[1:]]
        done = {at: work(item) for at, item in enumerate(items[:1])}
        # Every item is tried before any is waited for. Waiting in their order would let a thread that is free
        # begin the next one each time the calling thread looks for it, which then does nothing.
        done |= {at: work(items[at]) for at, other in enumerate(others, 1) if other.cancel()}
        return [done[at] if at in done else others[at - 1].result() for at in range(len(items))]
