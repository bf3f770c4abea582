"""Stragglers, nodes that come and go, and replies that come when nobody waits any more."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.run import Run

from fedlora.core.messages import Peer
from fedlora.engines.polling import PollingGrid
from fedlora.errors import FedLoraError
from fedlora.rounds.pending import PendingMessages
from fedlora.rounds.registry import ClientRegistry


class Slow:
    """A network: a node answers after its own delay, fails, or never does; only those online are there."""

    def __init__(self, delays: dict[int, float | None], failing: Sequence[int] = ()) -> None:
        self.delays, self.failing, self.online = delays, failing, [*delays]
        self.out: dict[str, tuple[Message, float]] = {}
        self.pushed: list[int] = []

    def set_run(self, run: Run) -> None: ...

    def get_node_ids(self) -> Iterable[int]:
        return self.online

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.pushed.append(node)
            if self.delays[node] is None and node in self.failing:
                ids.append(None)  # a SuperLink that does not take a message says so
                continue
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            delay = self.delays[node]
            self.out[message.metadata.message_id] = (
                message,
                time.monotonic() + (1e9 if delay is None else delay),
            )
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        ready = [i for i in ids if i in self.out and self.out[i][1] <= time.monotonic()]
        return [self.reply(self.out.pop(i)[0]) for i in ready]

    def reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.failing:
            error = Message(Error(5, "Node unavailable"), reply_to=message)
            error.metadata.__dict__["_src_node_id"] = 1  # the SuperLink says it, not the node
            return error
        if message.metadata.message_type == "query.profile":
            return Message(RecordDict({"profile": ConfigRecord(self.profile(node))}), reply_to=message)
        return Message(RecordDict(), reply_to=message)

    def profile(self, node: int) -> dict[str, Any]:
        return {"client": node - 100, "rank": 4}


def train(nodes: Iterable[int]) -> list[Message]:
    return [Message(RecordDict(), node, "train", group_id="3") for node in nodes]


def answered(grid: PollingGrid, messages: list[Message], timeout: float | None = 5) -> list[int]:
    asked = PendingMessages()
    replies = grid.send_and_receive(map(asked.note, messages), timeout=timeout)
    return [asked.node(reply) or 0 for reply in replies]


def test_a_round_ends_when_enough_have_answered() -> None:
    slow, done = Slow({101: 0.0, 102: 9.0, 103: 0.05}), []
    grid = PollingGrid(slow, lambda sampled: sampled - 1, 0.01, done.append)  # type: ignore[arg-type]
    began = time.monotonic()
    assert answered(grid, train([101, 102, 103])) == [101, 103]
    assert time.monotonic() - began < 5
    assert done == [1, 1]
    assert grid.busy == {102}


def test_a_failure_is_no_reply_to_wait_for_less_and_names_its_node() -> None:
    grid = PollingGrid(Slow({101: 0.0, 102: 0.0, 103: 0.1}, [101]), lambda sampled: 2, 0.01)  # type: ignore[arg-type]
    assert answered(grid, train([101, 102, 103])) == [101, 102, 103]
    assert grid.busy == set()


def test_nobody_is_waited_for_longer_than_the_timeout() -> None:
    grid = PollingGrid(Slow({101: 0.0, 102: None}), lambda sampled: sampled, 0.01)  # type: ignore[arg-type]
    began = time.monotonic()
    assert answered(grid, train([101, 102]), timeout=0.2) == [101]
    assert 0.2 <= time.monotonic() - began < 2
    assert grid.busy == {102}


def test_a_late_reply_is_thrown_away_and_its_node_is_free_again() -> None:
    slow, said = Slow({101: 0.0, 102: 0.3}), []
    grid = PollingGrid(slow, lambda sampled: 1, 0.01, late=said.append)  # type: ignore[arg-type]
    assert answered(grid, train([101, 102])) == [101]
    assert list(grid.get_node_ids()) == [101, 102]
    assert grid.busy == {102}
    assert said == []
    time.sleep(0.35)
    list(grid.get_node_ids())
    assert grid.busy == set()
    assert len(said) == 1
    assert "round 3" in said[0]
    assert answered(grid, train([101])) == [101]  # the late one does not come up again


def test_a_node_that_died_is_told_from_one_that_is_slow() -> None:
    slow, said = Slow({101: 0.0, 102: 0.1, 103: 0.2}, [102]), []
    grid = PollingGrid(slow, lambda sampled: 1, 0.01, late=said.append)  # type: ignore[arg-type]
    assert answered(grid, train([101, 102, 103])) == [101]
    time.sleep(0.25)
    list(grid.get_node_ids())
    dead, late = sorted(said)
    assert "node 102" in dead and "Node unavailable" in dead  # noqa: PT018
    assert "node 103" in late and "came after its round" in late  # noqa: PT018


def test_what_a_superlink_does_not_take_is_not_waited_for() -> None:
    grid = PollingGrid(Slow({101: 0.0, 102: None}, [102]), lambda sampled: sampled, 0.01)  # type: ignore[arg-type]
    began = time.monotonic()
    assert answered(grid, train([101, 102]), timeout=3) == [101]
    assert time.monotonic() - began < 1


def test_questions_wait_for_all_and_make_nobody_busy() -> None:
    grid = PollingGrid(Slow({101: 0.0, 102: 0.1}), lambda sampled: 1, 0.01)  # type: ignore[arg-type]
    asked = [Message(RecordDict(), node, "query.keys") for node in (101, 102)]
    assert answered(grid, asked) == [101, 102]
    assert grid.busy == set()


def test_a_reply_in_another_nodes_name_is_nobodys() -> None:
    asked = PendingMessages()
    (message,) = map(asked.note, train([101]))
    message.metadata.__dict__["_message_id"] = "m"
    reply = Message(RecordDict(), reply_to=message)
    assert asked.node(reply) == 101
    reply.metadata.__dict__["_src_node_id"] = 102
    assert asked.node(reply) is None
    error = Message(Error(2, "not mine"), reply_to=message)
    for sender, node in ((101, 101), (1, 101), (102, None)):
        error.metadata.__dict__["_src_node_id"] = sender
        assert asked.node(error) == node


@pytest.fixture
def roster() -> Callable[..., tuple[ClientRegistry, list[str]]]:
    def make(**more: Any) -> tuple[ClientRegistry, list[str]]:
        said: list[str] = []
        return ClientRegistry(Peer, 8, said.append, **more), said

    return make


def test_nodes_are_met_once_and_again_when_they_were_away(roster: Any) -> None:
    slow, (found, _) = Slow({102: 0.0, 101: 0.0}), roster()
    grid = PollingGrid(slow, int, 0.01)  # type: ignore[arg-type]
    assert found.gather(grid) == [101, 102]  # in the order of clients
    assert found.gather(grid) == [101, 102]
    assert slow.pushed == [101, 102]
    slow.online = [102]
    assert found.gather(grid) == [102]
    slow.online = [102, 101]
    slow.profile = lambda node: {"client": node - 100, "rank": 2}  # type: ignore[method-assign]
    assert found.gather(grid) == [101, 102]
    assert slow.pushed == [101, 102, 101]
    assert [found.peers[node].rank for node in (101, 102)] == [2, 4]


def test_a_run_waits_for_the_clients_that_it_needs(roster: Any) -> None:
    slow, (found, _) = Slow({101: 0.0, 102: 0.0}), roster()
    slow.online, came = [101], time.monotonic() + 0.6
    slow.get_node_ids = lambda: [101, 102][: 1 + (time.monotonic() > came)]  # type: ignore[method-assign]
    assert found.gather(PollingGrid(slow, int, 0.01), 2, 30) == [101, 102]  # type: ignore[arg-type]
    slow.get_node_ids = lambda: [101]  # type: ignore[method-assign]
    assert found.gather(PollingGrid(slow, int, 0.01), 2, 0.1) == [101]  # type: ignore[arg-type]
    slow.get_node_ids = lambda: []  # type: ignore[method-assign]
    with pytest.raises(FedLoraError, match="no client took part within"):
        found.gather(PollingGrid(slow, int, 0.01), 2, 0.1)  # type: ignore[arg-type]


HOSTILE: dict[str, dict[str, Any]] = {
    "no client": {"rank": 4},
    "a negative client": {"client": -1, "rank": 4},
    "a client that is text": {"client": "0", "rank": 4},
    "a client that is true": {"client": True, "rank": 4},
    "no rank": {"client": 0},
    "rank 0": {"client": 0, "rank": 0},
    "a negative rank": {"client": 0, "rank": -3},
    "a rank that nobody serves": {"client": 0, "rank": 10**9},
    "a rank that is a float": {"client": 0, "rank": 4.0},
    "the client of another": {"client": 2, "rank": 4},
    "nothing": {},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_node_that_lies_about_itself_cannot_take_part(what: str, roster: Any) -> None:
    slow, (found, said) = Slow({102: 0.0, 103: 0.0}), roster()
    slow.profile = lambda node: HOSTILE[what] if node == 103 else {"client": 2, "rank": 4}  # type: ignore[method-assign]
    grid = PollingGrid(slow, int, 0.01)  # type: ignore[arg-type]
    assert found.gather(grid) == [102]
    assert len(said) == 1
    assert found.gather(grid) == [102]  # nor is it asked in every round
    assert slow.pushed == [102, 103]


def test_a_node_that_could_not_be_reached_is_asked_again(roster: Any) -> None:
    slow, (found, said) = Slow({101: 0.0, 102: 0.0}, [102]), roster()
    grid = PollingGrid(slow, int, 0.01)  # type: ignore[arg-type]
    assert found.gather(grid) == [101]
    slow.failing = []
    assert found.gather(grid) == [101, 102]
    assert said == []


def test_a_reply_without_a_profile_is_no_client(roster: Any) -> None:
    slow, (found, said) = Slow({101: 0.0}), roster()
    slow.reply = lambda message: Message(RecordDict(), reply_to=message)  # type: ignore[method-assign]
    with pytest.raises(FedLoraError):
        found.gather(PollingGrid(slow, int, 0.01))  # type: ignore[arg-type]
    assert len(said) == 1


def test_the_plan_goes_to_whoever_is_met(roster: Any) -> None:
    slow, (found, _) = Slow({101: 0.0}), roster(plan={"plan": "x"})
    seen: list[Any] = []
    real = slow.reply
    slow.reply = lambda message: (seen.append(dict(message.content["plan"])), real(message))[1]  # type: ignore
    found.gather(PollingGrid(slow, int, 0.01))  # type: ignore[arg-type]
    assert seen == [{"plan": "x"}]
