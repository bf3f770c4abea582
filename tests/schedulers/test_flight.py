"""Who is at work when: in virtual time by its events, and on a grid whose replies come when they come."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedlora.core.algebra import dense
from fedlora.core.messages import Peer
from fedlora.engines.in_process import InProcessGrid
from fedlora.rounds.speeds import Speeds
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.schedulers import Asynchronous, Buffered, flight
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA
from fedlora.training.client import TrainRequest


@pytest.fixture
def clock(tmp_path: Path) -> Any:
    """Virtual time from the rows of a trace."""

    def made(*rows: str) -> VirtualClock:
        text = "\n".join(["client,seconds,absent_from,absent_until", *rows])
        (tmp_path / "trace.csv").write_text(text + "\n")
        return VirtualClock(Speeds.of(tmp_path / "trace.csv"), 0)

    return made


def events(ran: Any) -> list[tuple[float, list[tuple[int, int]]]]:
    """Of each round, when it ended, and which clients of which age were in it."""
    ages: dict[int, list[tuple[int, int]]] = {}
    for line in ran.lines("clients.jsonl"):
        ages.setdefault(line["round"], []).append((line["client"], line["staleness"]))
    return [(line["virtual_seconds"], ages[line["round"]]) for line in ran.lines("metrics.jsonl")]


def test_clients_finish_in_the_order_of_their_speeds(lab: Any, clock: Any) -> None:
    settings = {"rounds": 4, "scheduler": Buffered(buffer=2)}
    ran = lab.run(FedIT(), clock=clock("0,1", "1,2", "2,5"), **settings)
    assert events(ran) == [
        (2.0, [(0, 0), (1, 0)]),
        (4.0, [(0, 0), (1, 0)]),
        (5.0, [(0, 0), (2, 2)]),  # at once: the smaller number is first
        (6.0, [(0, 0), (1, 1)]),
    ]
    assert ran.client.groups == [[0, 1], [0, 1], [0, 2], [0, 1]]  # a buffer's clients train in one pass
    again = lab.run(FedIT(), clock=clock("0,1", "1,2", "2,5"), **settings)
    assert (events(again), again.digest) == (events(ran), ran.digest)


def test_so_many_are_at_work_and_others_take_their_turns(lab: Any, clock: Any) -> None:
    rows = [f"{client},{client + 1}" for client in range(8)]
    ran = lab.run(
        FFALoRA(), (4,) * 8, rounds=20, scheduler=Buffered(buffer=2, concurrency=3), clock=clock(*rows)
    )
    taken = {client for _, found in events(ran) for client, _ in found}
    assert taken == {*range(8)}
    assert max(age for _, found in events(ran) for _, age in found) <= 3
    times = [when for when, _ in events(ran)]
    assert times == sorted(times)


def test_who_is_absent_is_asked_for_nothing_and_answers_when_it_is_back(lab: Any, clock: Any) -> None:
    rows = ("0,2", "1,2,0,5", "2,2,1,9")
    ran = lab.run(FedIT(), rounds=5, scheduler=Asynchronous(), clock=clock(*rows))
    # 1 comes at 5, and works until 7; 2 is done at 2 and back at 9.
    assert events(ran) == [
        (2.0, [(0, 0)]),
        (4.0, [(0, 0)]),
        (6.0, [(0, 0)]),
        (8.0, [(0, 0)]),
        (8.0, [(1, 1)]),
    ]


def test_where_all_are_absent_time_goes_on_to_the_first_that_is_back(lab: Any, clock: Any) -> None:
    ran = lab.run(FedIT(), (4, 4), rounds=1, scheduler=Asynchronous(), clock=clock("0,1,0,30", "1,1,0,20"))
    assert events(ran) == [(21.0, [(1, 0)])]


@pytest.mark.parametrize(
    "scheduler", [Asynchronous(alpha=0.5), Buffered(buffer=2, lr=0.8)], ids=["each", "buffered"]
)
def test_the_change_against_what_was_sent_is_added_by_its_age_and_share(
    lab: Any, noise: Any, clock: Any, scheduler: Any
) -> None:
    strategy, ranks = FlexLoRA(), (4, 1, 2)
    ran = lab.prepare(
        strategy,
        ranks,
        rounds=6,
        scheduler=scheduler,
        clock=clock("0,1", "1,2.3", "2,4.7"),
        weights="uniform",
    )
    states = [ran.federation.state]
    ran.handle.callbacks = ()
    for _ in ran.federation.rounds(ran.grid):
        states.append(ran.federation.state)
    assert max(line["staleness"] for line in ran.lines("clients.jsonl")) > 1
    eta = getattr(scheduler, "alpha", None) or scheduler.lr / 2  # over the buffer
    for number in range(1, 7):
        before, after = states[number - 1 : number + 1]
        found = [line for line in ran.lines("clients.jsonl") if line["round"] == number]
        for module in before.adapter.pairs:
            want = before.delta(module).double()
            for line in found:
                old = states[number - 1 - line["staleness"]]
                task = strategy.task(old, Peer(line["client"], line["rank"]))
                request = TrainRequest(line["client"], old.round + 1, 0, task, [], {}, None)
                trained = noise()._moved(request)
                change = dense(trained.pairs[module]).double() - dense(task.adapter.pairs[module]).double()
                want += eta * (line["staleness"] + 1) ** -0.5 * change
            torch.testing.assert_close(after.delta(module).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cap", "shares"), [(4, (10, 20, 80)), (None, (10, 20, 10_000))])
def test_examples_count_up_to_a_cap(
    lab: Any, noise: Any, clock: Any, cap: float | None, shares: tuple[int, ...]
) -> None:
    """Of 10, 20 and 10,000 rows the last counts as four times the median; one more client is at work."""
    strategy, rows = FFALoRA(), (10, 20, 10_000, 1)
    ran = lab.prepare(
        strategy,
        (4,) * 4,
        rounds=1,
        scheduler=Buffered(buffer=3, cap=cap),
        rows=lambda client: [None] * rows[client],
        clock=clock("0,1", "1,1", "2,1", "3,9"),
    )
    start = ran.federation.state
    ran.handle.callbacks = ()
    ran.federation.run(ran.grid)
    want = start.adapter.extra["head.bias"].double()
    for client, share in enumerate(shares):
        task = strategy.task(start, Peer(client, 4))
        trained = noise()._moved(TrainRequest(client, 1, 0, task, [], {}, None))
        change = trained.extra["head.bias"] - start.adapter.extra["head.bias"]
        want += share / sum(shares) * change.double()
    torch.testing.assert_close(ran.federation.state.adapter.extra["head.bias"].double(), want)


def test_an_update_that_is_too_old_is_dropped_by_name(lab: Any, clock: Any) -> None:
    ran = lab.run(
        FedIT(), rounds=7, scheduler=Asynchronous(max_staleness=2), clock=clock("0,1", "1,1.1", "2,2.5")
    )
    (line,) = [line for line in ran.lines("clients.jsonl") if line["status"] == "dropped"]
    assert line["client"] == 2
    assert (
        "its task is of round 1, and scheduler.max_staleness takes none from before round 3" in line["reason"]
    )
    assert "client 2 dropped" in ran.text
    assert all(line["clients"] == 1 for line in ran.lines("metrics.jsonl"))  # another took its place


def test_a_second_reply_is_counted_once_and_named(lab: Any, clock: Any) -> None:
    settings = {"rounds": 3, "scheduler": Buffered(buffer=2)}
    want = lab.run(FedIT(), clock=clock("0,1", "1,2", "2,5"), **settings)
    twice = lambda replies: [*replies, *replies]  # noqa: E731
    ran = lab.run(FedIT(), clock=clock("0,1", "1,2", "2,5"), change=twice, **settings)
    assert ran.digest == want.digest
    assert (
        "a reply of client 1, which has answered or is too late, that nobody asked for was dropped"
        in ran.text
    )


def test_a_client_that_fails_is_dropped_and_the_buffer_waits_for_another(
    lab: Any, noise: Any, clock: Any
) -> None:
    ran = lab.run(
        FedIT(),
        rounds=2,
        client=noise(failing=frozenset({0})),
        scheduler=Buffered(buffer=2),
        clock=clock("0,1", "1,2", "2,5"),
    )
    lines = [(line["round"], line["client"], line["status"]) for line in ran.lines("clients.jsonl")]
    assert [line for line in lines if line[0] == 1] == [(1, 0, "dropped"), (1, 1, "ok"), (1, 2, "ok")]
    assert [line["clients"] for line in ran.lines("metrics.jsonl")] == [2, 2]


class Late(InProcessGrid):
    """A grid whose nodes answer only after so many looks for replies; None never answers."""

    looks: dict[int, int | None]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        self.due = {**getattr(self, "due", {})}
        for one, id in zip(sent, ids, strict=True):
            self.due[id] = self.looks[one.metadata.dst_node_id - 1000]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ids = list(message_ids)
        self.due = {id: None if left is None else left - 1 for id, left in self.due.items()}
        return list(
            super().pull_messages([id for id in ids if (left := self.due[id]) is not None and left < 0])
        )


def test_replies_are_taken_as_they_come_and_nobody_waits(lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(flight, "POLL", 0)
    ran = lab.prepare(FlexLoRA(), (4, 2, 1), rounds=8, scheduler=Asynchronous())
    ran.handle.callbacks = ()
    ran.grid.__class__ = Late
    ran.grid.looks = {0: 0, 1: 1, 2: 4}
    ran.federation.run(ran.grid)
    ages = {line["round"]: (line["client"], line["staleness"]) for line in ran.lines("clients.jsonl")}
    assert len(ages) == 8
    assert [client for client, _ in ages.values()].count(2) == 1
    assert max(ages.values())[0] == 2
    assert max(ages.values())[1] >= 2  # the slow one, which has held nobody up
    assert "virtual_seconds" not in ran.lines("metrics.jsonl")[0]


def test_who_does_not_answer_within_the_timeout_is_dropped_by_name(lab: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(flight, "POLL", 0.01)
    ran = lab.prepare(FedIT(), rounds=2, scheduler=Buffered(buffer=3), timeout=0.05)
    ran.handle.callbacks = ()
    ran.grid.__class__ = Late
    ran.grid.looks = {0: 0, 1: 0, 2: None}
    ran.federation.run(ran.grid)
    assert [line["clients"] for line in ran.lines("metrics.jsonl")] == [2, 2]
    dropped = [line for line in ran.lines("clients.jsonl") if line["status"] == "dropped"]
    assert {line["client"] for line in dropped} == {2}
    assert dropped[0]["reason"] == "no reply within 0.05 s"
