"""Work on all cores, that may hand out work in its turn."""

import threading
from collections.abc import Iterator

import pytest
import torch

from fedlora.models import Base, load
from fedlora.models.packaged import tiny
from fedlora.training.workers import Workers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load(tiny(), "classification", ("x", "y"))


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_work_within_work_comes_back_in_order_and_never_waits_for_itself(base: Base, threads: int) -> None:
    with Workers(base) as workers:

        def outer(n: int) -> list[list[int]]:
            return workers.map(lambda m: workers.map(lambda k: 100 * n + 10 * m + k, range(3)), range(4))

        found = workers.map(outer, range(6))
    assert found == [[[100 * n + 10 * m + k for k in range(3)] for m in range(4)] for n in range(6)]
    assert torch.get_num_threads() == threads


def test_as_many_threads_work_as_torch_would_use_each_with_one_of_torch_s(base: Base, threads: int) -> None:
    together, seen = threading.Barrier(threads, timeout=20), set()

    def meet(_: int) -> int:
        together.wait()  # passes only when so many are here at once
        seen.add(threading.get_ident())
        return torch.get_num_threads()

    with Workers(base) as workers:
        found = workers.map(meet, range(threads))
    assert found == [1] * threads
    assert len(seen) == threads


def test_every_thread_works_as_long_as_there_are_items(base: Base, threads: int) -> None:
    together = threading.Barrier(threads, timeout=20)

    def meet(n: int) -> int:
        together.wait()  # passes only when every thread has an item of its own
        return n

    with Workers(base) as workers:
        for _ in range(5):
            assert workers.map(meet, range(4 * threads)) == list(range(4 * threads))
            # The same of work that hands out work while the other threads are free.
            [found] = workers.map(lambda count: workers.map(meet, range(count)), [4 * threads])
            assert found == list(range(4 * threads))


def test_a_failure_is_the_caller_s_and_leaves_the_threads_as_they_were(base: Base, threads: int) -> None:
    def fail(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n

    with Workers(base) as workers, pytest.raises(ValueError, match="two"):
        workers.map(fail, range(5))
    assert torch.get_num_threads() == threads
