"""Three clients of which one is hostile, and what must come of whatever it sends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedlora.core.messages import Peer, State, Task
from fedlora.rounds.codec import read_update, write_update
from fedlora.rounds.exchange import MessageExchange
from fedlora.training.client import TrainResult


@dataclass
class World:
    """A state, the tasks of three clients, and their honest replies."""

    state: State
    peers: list[Peer]
    tasks: list[Task]
    honest: list[RecordDict]

    ROUND: ClassVar[int] = 3
    EVIL: ClassVar[int] = 1  # the hostile client

    def reply(self, client: int) -> RecordDict:
        """A copy of an honest reply, to write on."""
        return RecordDict({name: type(record)(dict(record)) for name, record in self.honest[client].items()})

    def receive(self, answers: Callable[[list[Message]], list[Message]]) -> Any:
        """What the inbox makes of the replies to a round; how they find their task is its business."""
        warned: list[str] = []
        inbox, asked = MessageExchange(warned.append, seed=0), []
        for k, (peer, task) in enumerate(zip(self.peers, self.tasks, strict=True)):
            message = inbox.message(1000 + k, peer, task, self.ROUND, 0)
            message.metadata.__dict__["_message_id"] = f"message-{k}"
            asked.append(message)
        found = inbox.receive(self.ROUND, answers(asked), read_update)
        return found.updates, found.tasks, found.lines, warned

    def judge(self, evil: Callable[[Message], Message], position: int, word: str) -> None:
        """Send the reply among honest ones: it alone must be dropped, and all else be as without it."""
        before = self.state.digest()

        def answers(asked: list[Message]) -> list[Message]:
            replies = [Message(self.reply(k), reply_to=asked[k]) for k in (0, 2)]
            replies.insert(position, evil(asked[self.EVIL]))
            return replies

        updates, tasks, lines, warned = self.receive(answers)
        assert [u.peer.id for u in updates] == [0, 2]
        for update, task, k in zip(updates, tasks, (0, 2), strict=True):
            assert task is self.tasks[k]
            sent = self.honest[k].array_records["arrays"]
            got = dict(update.adapter.tensors())
            assert all(np.array_equal(got[n].numpy(), a.numpy()) for n, a in sent.items())
            assert update.weight == 10 + k
        assert [(line["client"], line["status"]) for line in lines] == [(0, "ok"), (1, "dropped"), (2, "ok")]
        reason = lines[1]["reason"]
        assert word in reason
        assert len(reason) < 700
        assert reason.isprintable()
        assert [text for text in warned if f"client {self.EVIL} dropped: {reason}" in text]
        assert self.state.digest() == before


def make_world(strategy: Any, wire: Any) -> World:
    ranks = (4, 3, 4) if strategy.mixed_ranks else (4, 4, 4)
    state = strategy.init(wire.adapter(5))
    peers = [
        Peer(k, rank, {} if strategy.mixed_ranks else {"a.q": 5, "b.v": 6}) for k, rank in enumerate(ranks)
    ]
    tasks = [strategy.task(state, peer) for peer in peers]
    made = [wire.moved(task, own=True) for task in tasks]
    honest = [
        write_update(TrainResult(a, {"loss": 0.5}), t, World.ROUND, 10 + k)
        for k, (a, t) in enumerate(zip(made, tasks, strict=True))
    ]
    return World(state, peers, tasks, honest)


@pytest.fixture(scope="session")
def world(wire: Any) -> Callable[[Any], World]:
    """A strategy's world, made once."""
    made: dict[str, World] = {}

    def find(strategy: Any) -> World:
        if repr(strategy) not in made:
            made[repr(strategy)] = make_world(strategy, wire)
        return made[repr(strategy)]

    return find
