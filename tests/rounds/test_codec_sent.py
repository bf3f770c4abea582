"""What a part of a task has clients send beside the adapter is held to the strictness of all else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedlora.core.messages import Peer, Task
from fedlora.core.method import MethodPart
from fedlora.rounds.codec import LARGEST, read_update, size, write_update
from fedlora.training.client import TrainResult


@dataclass(frozen=True)
class Noted(MethodPart):
    """Has clients send a few numbers in a dtype of its own."""

    count: int

    def sends(self, task: Task) -> Mapping[str, Tensor]:
        return {"notes": torch.zeros(self.count, dtype=torch.float64)}


@pytest.fixture
def task(wire: Any) -> Task:
    return Task(wire.adapter(), method=(Noted(3), Noted(5)))


def reply(wire: Any, task: Task, **other: Any) -> RecordDict:
    sent = {"0/notes": torch.tensor([1.0, 2.0, 3.0]).double(), "1/notes": torch.ones(5).double()}
    content = write_update(TrainResult(wire.moved(task, own=True), {"loss": 0.25}, sent=sent), task, 3, 11)
    arrays = dict(content.array_records["arrays"])
    for name, value in other.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = Array(np.asarray(value))
    content["arrays"] = ArrayRecord(arrays)
    return content


def test_it_arrives_beside_the_adapter_and_its_bytes_count(wire: Any, task: Task) -> None:
    update = read_update(wire.respond(reply(wire, task)), task, Peer(0, 4), 3)
    assert {name: tensor.tolist() for name, tensor in update.sent.items()} == {
        "0/notes": [1.0, 2.0, 3.0],
        "1/notes": [1.0] * 5,
    }
    plain = replace(task, method=())
    bare = read_update(wire.respond(wire.honest(plain)), plain, Peer(0, 4), 3)
    assert update.adapter.digest() == bare.adapter.digest()
    assert bare.sent == {}
    assert size(reply(wire, task)) - size(wire.honest(plain)) >= 8 * 8


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"0/notes": None}, r"wrong tensors: missing \['0/notes'\]"),
        ({"2/notes": np.zeros(3)}, r"unknown \['2/notes'\]"),
        ({"0/notes": np.zeros(4)}, r"'0/notes': expected float64 \(3,\), got float64 \(4,\)"),
        ({"0/notes": np.zeros(3, np.float32)}, "'0/notes': expected float64 .* got float32"),
        ({"0/notes": np.array([1.0, np.nan, 0.0])}, "'0/notes' has numbers that are not finite"),
        ({"0/notes": np.array([1.0, 2 * LARGEST, 0.0])}, "'0/notes' has a norm of 2e"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_a_reply_that_is_wrong_there_is_dropped(wire: Any, task: Task, other: Any, why: str) -> None:
    said = wire.refused(reply(wire, task, **other), task)
    assert re.search(why, said), said


def test_what_nobody_announced_is_dropped(wire: Any, task: Task) -> None:
    assert "unknown ['0/notes', '1/notes']" in wire.refused(reply(wire, task), replace(task, method=()))
