from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

import fedlora.strategies
from fedlora.core import adapter
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Task
from fedlora.rounds.codec import read_task, read_update, size, write_task, write_update
from fedlora.training.client import TrainResult

STRATEGIES = [getattr(fedlora.strategies, name)() for name in fedlora.strategies.__all__]
NAME = "a.q.A"


def digest(task: Task) -> str:
    return adapter.digest("", sorted(task.pack()[0].items()))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_and_updates_survive_the_wire_bit_for_bit(
    strategy: Any, rank: int, dtype: torch.dtype, respond: Callable[[RecordDict], Message], wire: Any
) -> None:
    peer = Peer(5, rank, {"b.v": 2}, {"a.q": 0.3})
    task = strategy.task(strategy.init(wire.adapter(4, dtype=dtype)), peer)
    back, round, seed, _ = read_task(write_task(task, 3, 2**31)[0])
    assert (round, seed) == (3, 2**31)
    assert back.pack()[1] == task.pack()[1]
    assert digest(back) == digest(task)
    update = read_update(respond(wire.honest(back)), task, peer, 3)
    assert update.adapter.digest() == wire.moved(task).digest()
    assert (update.weight, update.peer, dict(update.metrics)) == (11.0, peer, {"loss": 0.25})


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_a_message_says_how_large_its_task_is_whatever_the_node_holds(strategy: Any, wire: Any) -> None:
    """A resumed run sends everything once more; its clients must be in the groups that they were in."""
    task = strategy.task(strategy.init(wire.adapter(4)), Peer(5, 4))
    first, held = write_task(task, 1, 0, version=1)
    second, _ = write_task(task, 2, 0, held, version=2)
    whole = sum(t.nbytes for t in task.pack()[0].values())
    assert first["config"]["whole"] == second["config"]["whole"] == whole
    assert size(second) <= size(first)


def test_a_parameter_without_dimensions_survives_the_wire(respond: Any) -> None:
    task = Task(Adapter({}, {"scale": torch.tensor(0.5)}))
    assert read_task(write_task(task, 1, 0)[0])[0].adapter.digest() == task.adapter.digest()
    read_update(respond(write_update(TrainResult(task.adapter, {}), task, 1, 5)), task, Peer(0, 4), 1)


def test_a_head_alone_survives_the_wire(respond: Any) -> None:
    task = Task(Adapter({}, {"head": torch.ones(2, 3)}))
    content, _ = write_task(task, 1, 0)
    assert size(content) > 24
    assert read_task(content)[0].adapter.digest() == task.adapter.digest()
    reply = write_update(TrainResult(task.adapter, {}), task, 1, 5)
    assert size(reply) > 24
    assert read_update(respond(reply), task, Peer(0, 4), 1).adapter.digest() == task.adapter.digest()


def test_only_shared_factors_travel(wire: Any) -> None:
    task = Task(wire.adapter(), frozenset("B"), frozenset("B"))
    assert set(wire.honest(task).array_records["arrays"]) == {"a.q.B", "b.v.B", "head.weight", "head.bias"}
    ffa = fedlora.strategies.FFALoRA()
    assert ffa.task(ffa.init(wire.adapter()), Peer(0, 4)).share == {"B"}


def test_a_receiver_may_write_on_what_it_reads(wire: Any) -> None:
    content, _ = write_task(Task(wire.adapter()), 1, 0)
    before = content.array_records["arrays"][f"adapter/{NAME}"].data
    task, *_ = read_task(content)
    task.adapter.pairs["a.q"].A.zero_()
    assert content.array_records["arrays"][f"adapter/{NAME}"].data == before


def test_a_tensor_that_is_not_contiguous_travels_as_it_reads() -> None:
    A = torch.arange(40.0).reshape(8, 5).T
    pair = Pair(A, torch.ones(3, 5), 1.0)
    back, *_ = read_task(write_task(Task(Adapter({"m": pair})), 1, 0)[0])
    assert torch.equal(back.adapter.pairs["m"].A, A)


def test_size_is_the_sum_of_the_records_own_count(wire: Any) -> None:
    content = wire.honest(Task(wire.adapter()))
    assert size(content) == sum(record.count_bytes() for record in content.values())
    payload = sum(t.numel() * t.element_size() for _, t in wire.adapter().tensors())
    assert payload < size(content) < payload + 300 * len(content.array_records["arrays"]) + 500
    assert size(RecordDict()) == 0
