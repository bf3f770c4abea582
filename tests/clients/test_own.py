"""A client's own factors, frozen modules and cores, through local training."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, LoRA, fresh_adapter, targets
from fedlora.models.parametrizations import CoreMatrix
from fedlora.training.client import TrainRequest

SGD = partial(torch.optim.SGD)
CLIENT = LocalTraining(lr=0.1, batch_size=4, optimizer=SGD, clip=None)


def rows(number: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng([seed, 1])
    return [Example(rng.integers(2, 200, 3 + i % 5).tolist(), i % 2) for i in range(number)]


def start(base: Base, rank: int, seed: int = 0) -> Adapter:
    """With B of its own, so that every factor has a gradient."""
    shapes = targets(base, ["query", "value"])
    adapter = fresh_adapter(base, shapes, LoRA().peer(0, rank, shapes), base.heads, seed)
    made = torch.Generator().manual_seed(seed)
    pairs = {m: replace(p, B=0.05 * torch.randn(p.B.shape, generator=made)) for m, p in adapter.pairs.items()}
    return Adapter(pairs, adapter.extra)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own_head", [False, True])
def test_own_parts_go_on_from_memory_and_the_shared_ones_from_the_task(base: Base, own_head: bool) -> None:
    task = Task(start(base, 2), share=frozenset("A"), personal=frozenset({"classifier"} if own_head else ()))
    first = TrainRequest(1, 1, 0, task, rows(6))
    [one] = CLIENT.train(base, [first])
    after = dict(one.adapter.tensors())
    assert one.memory.keys() == {*task.own()}
    assert {name.rpartition(".")[2] for name in one.memory} == {
        "B",
        *(["weight", "bias"] if own_head else []),
    }
    assert all(torch.equal(tensor, after[name]) for name, tensor in one.memory.items())

    # Round 2: another A and head from the server; what is the client's own from its memory.
    new = start(base, 2, seed=5)
    second = TrainRequest(1, 2, 0, replace(task, adapter=new), rows(6), one.memory)
    began = dict(second.start.tensors())
    for name, tensor in new.tensors():
        assert torch.equal(began[name], one.memory[name] if name in task.own() else tensor)
    [two] = CLIENT.train(base, [second])
    plain = replace(second, task=Task(second.start), memory={})
    [want] = CLIENT.train(base, [plain])
    for name, tensor in two.adapter.tensors():
        close(tensor, dict(want.adapter.tensors())[name])
        assert not torch.equal(tensor, began[name])


def test_a_memory_is_for_its_own_part_alone(base: Base) -> None:
    """What a memory holds besides, from a stage before, is not taken."""
    adapter = start(base, 2)
    memory = {name: torch.full_like(tensor, 9.0) for name, tensor in adapter.tensors()}
    shared = TrainRequest(1, 2, 0, Task(adapter), rows(3), memory)
    assert shared.start.digest() == adapter.digest()
    own = replace(shared, task=Task(adapter, share=frozenset("A")))
    for m, pair in own.start.pairs.items():
        assert torch.equal(pair.A, adapter.pairs[m].A)
        assert (pair.B == 9).all()
    assert all(not (tensor == 9).all() for tensor in own.start.extra.values())


def test_clients_of_one_pass_keep_their_own(base: Base) -> None:
    task = Task(start(base, 2), share=frozenset("A"), personal=frozenset({"classifier"}))
    memories = [dict(start(base, 2, seed).tensors()) for seed in (3, 4)]
    work = [TrainRequest(i, 2, 0, task, rows(5, i), memory) for i, memory in enumerate(memories)]
    together = CLIENT.train(base, work)
    for one, job in zip(together, work, strict=True):
        [alone] = CLIENT.train(base, [job])
        assert one.memory.keys() == alone.memory.keys()
        for name, tensor in alone.memory.items():
            close(one.memory[name], tensor)
    first, second = (dict(one.memory) for one in together)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_a_client_is_evaluated_with_its_own_parts_and_before_it_trains(base: Base) -> None:
    task = Task(start(base, 2), share=frozenset("A"), personal=frozenset({"classifier"}))
    [one] = CLIENT.train(base, [TrainRequest(1, 1, 0, task, rows(6))])
    later = TrainRequest(1, 2, 0, task, rows(9, 7), one.memory)
    whole = replace(later, task=Task(later.start), memory={})
    assert CLIENT.evaluate(base, [later]) == CLIENT.evaluate(base, [whole])
    assert CLIENT.evaluate(base, [later]) != CLIENT.evaluate(base, [replace(later, memory={})])
    assert all(np.isnan(x) for x in CLIENT.evaluate(base, [replace(later, rows=[])])[0])


def test_a_client_without_own_parts_keeps_nothing(base: Base) -> None:
    for task in (Task(start(base, 2)), Task(start(base, 2), frozenset("B"), frozenset("B"))):
        assert CLIENT.train(base, [TrainRequest(1, 1, 0, task, rows(3))])[0].memory == {}


def test_a_resting_module_is_neither_moved_nor_kept(base: Base) -> None:
    adapter = start(base, 2)
    awake = frozenset(list(adapter.pairs)[:1])
    task = Task(adapter, share=frozenset("A"), frozen=frozenset(adapter.pairs) - awake)
    [one] = CLIENT.train(base, [TrainRequest(1, 1, 0, task, rows(4))])
    assert {*one.memory} == {f"{m}.B" for m in awake}
    for m, pair in one.adapter.pairs.items():
        for factor, tensor in pair.factors():
            assert torch.equal(tensor, dict(adapter.pairs[m].factors())[factor]) == (m not in awake)


def test_the_factor_of_a_parametrization_is_trained_with_the_rate_of_A(base: Base) -> None:
    plain = start(base, 2)
    cores = {f"{m}.core": torch.eye(2) for m in plain.pairs}
    task = Task(Adapter(plain.pairs, cores, CoreMatrix()), frozenset(), frozenset())
    moved = []
    for rate in (0.1, 0.3):
        client = replace(CLIENT, lr=rate, lr_ratio=7.0, head_lr=9.0)
        [one] = client.train(base, [TrainRequest(1, 1, 0, task, rows(4))])
        moved.append({name: core - torch.eye(2) for name, core in one.adapter.extra.items()})
        assert Adapter(one.adapter.pairs).digest() == Adapter(plain.pairs).digest()
    for name, step in moved[0].items():
        assert step.any()
        close(3 * step, moved[1][name])
