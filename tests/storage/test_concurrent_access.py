"""Several at once over one folder: locks, ledgers and files, between threads and between processes."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedlora.core.messages import Task
from fedlora.errors import CheckpointError
from fedlora.privacy import DPSGD, Entry, Ledger
from fedlora.rounds.codec import write_task
from fedlora.storage.atomic import STALE, locked, write_whole
from fedlora.storage.client_state import ClientStore

PLAN = DPSGD(epsilon=5.0, participations=3, accountant="rdp").plan(100, 10, 10)
MANY = 8


def at_once(work: Callable[[int], Any], many: int = MANY) -> list[Any]:
    """What so many threads make of their numbers, begun together; an error in the place of a result."""
    barrier = Barrier(many)

    def one(number: int) -> Any:
        barrier.wait()
        try:
            return work(number)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(many) as pool:
        return list(pool.map(one, range(many)))


@pytest.fixture
def slow(lab: Any, noise: Any, tmp_path: Path) -> Any:
    """A site whose only client takes a while, under a budget of three rounds; a new one each time."""

    @dataclass(frozen=True)
    class Slow(noise):  # type: ignore[misc]
        private = True

        def plan(self, rows: int) -> Any:
            return PLAN

        def train(self, base: Any, assignments: Any) -> Any:
            time.sleep(0.05)
            made = super().train(base, assignments)
            return [replace(o, ledger=PLAN.after(a.ledger)) for o, a in zip(made, assignments, strict=True)]

    return lambda: replace(lab.site(Slow()), memory=ClientStore(tmp_path / "clients"))


def answered(lab: Any, place: Any) -> bool:
    """Whether a training message is answered by an update."""
    asked = Message(write_task(Task(lab.adapter()), 1, 0)[0], 1000, "train", group_id="1")
    asked.metadata.__dict__["_message_id"] = "m"
    [reply] = place.train([asked], [Context(1, 1000, {"client": 0, "rank": 4}, RecordDict(), {})])
    return not reply.has_error()


def test_a_site_pays_for_every_message_of_several_threads(lab: Any, slow: Any, tmp_path: Path) -> None:
    found = at_once(lambda _: answered(lab, slow()))
    assert sorted(map(bool, found)) == [False] * 5 + [True] * 3
    ledger = ClientStore(tmp_path / "clients").ledger(0)
    assert ledger is not None
    assert ledger == PLAN.after(PLAN.after(PLAN.after(None)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sites run where processes fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_site_pays_for_every_message_of_several_processes(lab: Any, slow: Any, tmp_path: Path) -> None:
    context = get_context("fork")
    said = context.SimpleQueue()
    processes = [context.Process(target=lambda: said.put(answered(lab, slow()))) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 5
    assert sorted(said.get() for _ in processes) == [False, False, True, True, True]
    assert ClientStore(tmp_path / "clients").ledger(0) == PLAN.after(PLAN.after(PLAN.after(None)))


def test_of_those_who_read_the_same_ledger_one_can_spend(tmp_path: Path) -> None:
    memory = ClientStore(tmp_path)
    first = Ledger(1e-5).plus(Entry(1.0, 0.1, 10))
    for before in (None, first):
        after = (before or Ledger(1e-5)).plus(Entry(1.0, 0.1, 10))
        found = at_once(lambda _, before=before, after=after: memory.spend(0, before, after))  # type: ignore[misc]
        assert [x for x in found if x is None] == [None]
        errors = [str(x) for x in found if x is not None]
        assert all("no longer the ledger that was read" in text for text in errors)
        assert not any("sigma" in text or "0.1" in text for text in errors)  # they go to the server
        assert memory.ledger(0) == after


def test_writers_of_one_file_do_not_take_each_others_place(tmp_path: Path) -> None:
    file = tmp_path / "file"

    def write(number: int) -> None:
        for _ in range(10):
            write_whole(file, lambda made: made.write_text(f"{number}" * 10_000))

    assert at_once(write) == [None] * MANY
    assert file.read_text() in {f"{number}" * 10_000 for number in range(MANY)}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    left, fresh, other = (tmp_path / name for name in ("a.1-x.tmp", "a.2-y.tmp", "b.3-z.tmp"))
    for path in (left, fresh, other):
        path.write_text("half")
    for path in (left, other):
        os.utime(path, (time.time() - STALE - 60,) * 2)
    write_whole(tmp_path / "a", lambda made: made.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.2-y.tmp", "b.3-z.tmp"}


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def broken(made: Path) -> None:
        made.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(tmp_path / "a", broken)
    assert list(tmp_path.iterdir()) == []


def test_groups_whose_clients_overlap_wait_for_each_other_and_not_forever(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> int:
        clients = [0, 1, 65] if number % 2 else [65, 1, 0]  # 65 and 1 share a file
        with ClientStore(tmp_path).alone(clients):
            inside.append(number)
            time.sleep(0.01)
            seen = list(inside)
            inside.remove(number)
        return len(seen)

    assert at_once(work) == [1] * MANY


def test_a_lock_is_let_go_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "deep" / "lock"):
        raise RuntimeError
    with locked(tmp_path / "deep" / "lock"):
        pass
