"""Training messages without a server: a task's adapter, honest replies to it, and how a reply is refused."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Task
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import read_update, write_update
from fedlora.training.client import TrainResult


@dataclass
class Wire:
    """Makes adapters and replies, and reads why a reply is refused."""

    respond: Callable[[RecordDict], Message]

    def adapter(
        self, rank: int = 4, scale: float = 1.7, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Adapter:
        rng = np.random.default_rng(seed)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

        pairs = {
            name: Pair(tensor(rank + i, d_in), tensor(d_out, rank + i), scale + i)
            for i, (name, (d_out, d_in)) in enumerate({"a.q": (6, 8), "b.v": (8, 5)}.items())
        }
        return Adapter(pairs, {"head.weight": tensor(2, 3), "head.bias": tensor(2)})

    def moved(self, task: Task, own: bool = False) -> Adapter:
        """The task's adapter with what is shared moved, and with `own` what the client keeps, too."""
        names, step = {*task.shared(), *(task.own() if own else [])}, {"A": 1, "B": -1}
        moved = {n: t * 3 for n, t in task.adapter.extra.items() if n in names}
        for module, pair in task.adapter.pairs.items():
            moved |= {f"{module}.{f}": t + step[f] for f, t in pair.factors() if f"{module}.{f}" in names}
        return task.adapter.with_tensors(moved)

    def honest(self, task: Task, round: int = 3, examples: int = 11) -> RecordDict:
        return write_update(TrainResult(self.moved(task, own=True), {"loss": 0.25}), task, round, examples)

    def refused(self, content: RecordDict, task: Task | None = None) -> str:
        with pytest.raises(IncompatibleUpdates) as caught:
            read_update(self.respond(content), task or Task(self.adapter()), Peer(0, 4), 3)
        return str(caught.value)


@pytest.fixture(scope="session")
def respond() -> Callable[[RecordDict], Message]:
    """A reply with this content to some training message."""

    def make(content: RecordDict) -> Message:
        request = Message(RecordDict(), 1001, "train", group_id="1")
        request.metadata.__dict__["_message_id"] = "m"
        return Message(content, reply_to=request)

    return make


@pytest.fixture(scope="session")
def wire(respond: Callable[[RecordDict], Message]) -> Wire:
    return Wire(respond)
