"""A run goes round by round, and an own scheduler decides when to send and when to aggregate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fedlora.callbacks.base import Callbacks
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA


@dataclass(frozen=True)
class EveryFew(Scheduler):
    """Aggregates whenever so many updates have come; the other clients go on with what they were sent."""

    few: int

    def rounds(self, server: Any, grid: Any) -> Iterator[dict[str, Any]]:
        out: list[str] = []
        while not server.finished:
            round = server.begin_round(grid)  # samples clients that have nothing to do
            out += grid.push_messages(server.messages(round))
            replies = grid.pull_messages(out[: self.few])
            out = out[self.few :]
            yield server.finish_round(round, replies, keep_waiting=True)


@dataclass(frozen=True)
class Seen(FFALoRA):
    """Notes how many rounds of the state each update has missed."""

    linear, exact, mixed_ranks = FFALoRA.linear, FFALoRA.exact, FFALoRA.mixed_ranks

    def aggregate(self, state: Any, updates: Any, rng: Any) -> Any:
        SEEN.append([(u.peer.id, state.round - u.version) for u in updates])
        return super().aggregate(state, updates, rng)


SEEN: list[list[tuple[int, int]]] = []


def test_an_own_scheduler_aggregates_every_two_and_knows_the_version_of_each_update(lab: Any) -> None:
    SEEN.clear()
    ran = lab.run(Seen(), (4,) * 5, rounds=4, scheduler=EveryFew(2))
    # Of five clients two are free again in every round; each goes on from the newest state.
    assert SEEN == [[(0, 0), (1, 0)], [(2, 1), (3, 1)], [(0, 1), (4, 2)], [(1, 2), (2, 1)]]
    assert ran.federation.state.round == 4
    assert [line["round"] for line in ran.lines("metrics.jsonl")] == [1, 2, 3, 4]
    assert {line["status"] for line in ran.lines("clients.jsonl")} == {"ok"}


def test_all_at_once_without_waiting_is_the_synchronous_schedule(lab: Any) -> None:
    want = lab.run(FlexLoRA(), (4, 2, 3), rounds=3)
    got = lab.run(FlexLoRA(), (4, 2, 3), rounds=3, scheduler=EveryFew(3))
    assert got.digest == want.digest


def test_every_update_of_a_synchronous_round_starts_from_the_newest_state(lab: Any) -> None:
    SEEN.clear()
    lab.run(Seen(), rounds=3, scheduler=Synchronous())
    assert SEEN == [[(0, 0), (1, 0), (2, 0)]] * 3


def test_a_run_goes_round_by_round(lab: Any) -> None:
    want = lab.run(FedIT(), rounds=3)
    ran = lab.prepare(FedIT(), rounds=3)
    Callbacks(ran.handle).run_begin()
    server = ran.federation
    assert server.state.round == 0
    rounds = server.rounds(ran.grid)
    for number in (1, 2):
        assert next(rounds) == ran.lines("metrics.jsonl")[-1]
        assert (server.done, server.state.round) == (number, number)
    server.run(ran.grid)  # whoever looked at two rounds has the rest run
    assert server.finished
    assert list(rounds) == []
    assert ran.digest == want.digest


def test_an_error_in_a_strategy_comes_out_of_the_loop_as_it_is(lab: Any) -> None:
    class Wrong(FedIT):
        def aggregate(self, state: Any, updates: Any, rng: Any) -> Any:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        lab.run(Wrong())
