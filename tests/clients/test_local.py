import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, fresh_adapter, targets
from fedlora.training.client import TrainRequest


def rows(number: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng([seed, 1])
    return [Example(rng.integers(2, 200, 3 + i % 5).tolist(), i % 2) for i in range(number)]


def assignment(number: int, client: int = 0, round: int = 1, seed: int = 0, task: Any = None) -> TrainRequest:
    return TrainRequest(client, round, seed, task or Task(Adapter({})), rows(number, client))


def start(base: Base, rank: int, **more: Any) -> Task:
    shapes = targets(base, ["query", "value"])
    return Task(fresh_adapter(base, shapes, LoRA().peer(0, rank, shapes), base.heads), **more)


def gap(one: Adapter, other: Adapter) -> float:
    a, b = dict(one.tensors()), dict(other.tensors())
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_every_epoch_goes_over_all_rows_in_a_new_order() -> None:
    work = assignment(10)
    found = LocalTraining(lr=0.1, batch_size=4, epochs=3).batches(work)
    assert [len(batch) for batch in found] == [4, 4, 2] * 3
    passes = [[row for batch in found[i : i + 3] for row in batch] for i in (0, 3, 6)]
    for order in passes:
        assert sorted(order, key=repr) == sorted(work.rows, key=repr)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != list(work.rows)


def test_steps_replace_epochs_and_go_round() -> None:
    client = LocalTraining(lr=0.1, batch_size=4, epochs=9, steps=5)
    found = client.batches(assignment(10))
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 4]
    assert found[:3] == LocalTraining(lr=0.1, batch_size=4).batches(assignment(10))
    assert [len(b) for b in client.batches(assignment(1))] == [1] * 5
    assert [len(b) for b in LocalTraining(lr=0.1).batches(assignment(10))] == [8, 2]


def test_batches_follow_seed_client_and_round() -> None:
    client = LocalTraining(lr=0.1, batch_size=3)
    same = rows(20)

    def order(seed: int, who: int, round: int) -> list[Any]:
        return client.batches(TrainRequest(who, round, seed, Task(Adapter({})), same))

    first = order(1, 2, 3)
    torch.manual_seed(9)
    np.random.seed(9)
    assert order(1, 2, 3) == first
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)):
        assert order(*other) != first


class Counted(list[Example]):
    """Fails instead of letting a loop over nothing go on for ever."""

    asked = 0

    def __len__(self) -> int:
        self.asked += 1
        assert self.asked < 1000, "an endless loop"
        return super().__len__()


@pytest.mark.parametrize("steps", [None, 5])
def test_a_client_without_rows_has_no_batches(steps: int | None) -> None:
    work = dataclasses.replace(assignment(0), rows=Counted())
    assert LocalTraining(lr=0.1, steps=steps).batches(work) == []
    assert LocalTraining(lr=0.1).step_tokens([]) == 0


def test_the_tokens_of_a_step() -> None:
    client = LocalTraining(lr=0.1, batch_size=4)
    assert client.step_tokens([Example([1] * n, 0) for n in (2, 4, 6, 8, 10)]) == 24
    assert client.step_tokens([Example([1] * n, 0) for n in (2, 5)]) == 7


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_the_result_is_the_same_in_any_group_and_order(base: Base, optimizer: Any) -> None:
    client = LocalTraining(
        lr=0.01,
        head_lr=0.003,
        batch_size=4,
        epochs=2,
        optimizer=optimizer,
        clip=0.5,
        schedule="linear",
        warmup=0.3,
    )
    work = [
        assignment(n, i, task=start(base, r)) for i, (n, r) in enumerate(((9, 2), (4, 4), (1, 1), (14, 3)))
    ]
    alone = [client.train(base, [one])[0] for one in work]
    together = client.train(base, work)
    turned = client.train(base, work[::-1])[::-1]
    split = client.train(base, work[:3:2]) + client.train(base, work[1::2])
    split = [split[i] for i in (0, 2, 1, 3)]
    for results in (together, turned, split):
        for one, other, job in zip(alone, results, work, strict=True):
            assert gap(one.adapter, other.adapter) < 1e-5
            assert gap(one.adapter, job.task.adapter) > 1e-4
            assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
            assert one.metrics["steps"] == other.metrics["steps"]
    assert [one.metrics["steps"] for one in alone] == [6, 2, 2, 8]
    again = client.train(base, work)
    assert [one.adapter.digest() for one in again] == [one.adapter.digest() for one in together]


def test_the_head_has_a_rate_of_its_own(base: Base) -> None:
    work = assignment(4, task=start(base, 2))
    sgd = partial(torch.optim.SGD)
    [slow] = LocalTraining(lr=0.1, head_lr=0.2, optimizer=sgd, clip=None).train(base, [work])
    [fast] = LocalTraining(lr=0.1, head_lr=0.6, optimizer=sgd, clip=None).train(base, [work])
    [same] = LocalTraining(lr=0.1, head_lr=None, optimizer=sgd, clip=None).train(base, [work])
    before = work.task.adapter
    for name, old in before.extra.items():
        torch.testing.assert_close(
            fast.adapter.extra[name] - old, 3 * (slow.adapter.extra[name] - old), rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(
            slow.adapter.extra[name] - old, 2 * (same.adapter.extra[name] - old), rtol=1e-4, atol=1e-7
        )
    for name, pair in same.adapter.pairs.items():
        assert torch.equal(slow.adapter.pairs[name].B, pair.B)
        assert pair.B.any()


@pytest.mark.parametrize("train", [{"A"}, {"B"}, set()])
def test_the_task_says_what_is_trained_and_the_head_always_is(base: Base, train: set[str]) -> None:
    task = start(base, 2, train=frozenset(train))
    for pair in task.adapter.pairs.values():
        pair.B.fill_(0.01)
    [done] = LocalTraining(lr=0.1, head_lr=0.1).train(base, [assignment(4, task=task)])
    before, after = dict(task.adapter.tensors()), dict(done.adapter.tensors())
    for name, old in before.items():
        moves = name in task.adapter.extra or name.rsplit(".", 1)[1] in train
        assert torch.equal(old, after[name]) != moves, name


def test_one_pass_trains_clients_with_their_own_factors_frozen(base: Base) -> None:
    tasks = [start(base, 2, train=frozenset(train)) for train in ({"A", "B"}, {"B"})]
    for task in tasks:
        for pair in task.adapter.pairs.values():
            pair.B.fill_(0.01)  # else A has no gradient
    done = LocalTraining(lr=0.1).train(base, [assignment(4, i, task=task) for i, task in enumerate(tasks)])
    for task, one in zip(tasks, done, strict=True):
        for name, pair in one.adapter.pairs.items():
            assert torch.equal(pair.A, task.adapter.pairs[name].A) == ("A" not in task.train)


def factors(steps: int, **settings: Any) -> list[float]:
    client = LocalTraining(lr=1.0, **settings)
    return [client.rate_factor(step, steps) for step in range(steps)]


def test_schedules() -> None:
    assert factors(3) == [1, 1, 1]
    assert factors(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(4, schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert factors(6, schedule="linear", warmup=1 / 3) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert factors(4, warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    for schedule in ("constant", "linear", "cosine"):
        for steps in (1, 2, 7):
            for warmup in (0, 0.1, 0.5, 1):
                found = factors(steps, schedule=schedule, warmup=warmup)
                assert all(0 < f <= 1 for f in found)


def test_a_schedule_is_over_the_client_s_own_steps(base: Base) -> None:
    client = LocalTraining(lr=0.1, batch_size=1, schedule="linear", optimizer=torch.optim.SGD, clip=None)
    seen: list[list[float]] = []

    def spied(groups: Any) -> torch.optim.Optimizer:
        made, rates = torch.optim.SGD(groups), list[float]()
        seen.append(rates)
        made.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        return made

    client = dataclasses.replace(client, optimizer=spied)
    client.train(base, [assignment(n, i, task=start(base, 1)) for i, n in enumerate((4, 2))])
    assert seen[0] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert seen[1] == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, r"client\.lr: expected a number above 0, got 0"),
        ({"lr": float("nan")}, r"client\.lr"),
        ({"lr": "fast"}, r"client\.lr: .* got 'fast'"),
        ({"head_lr": -1}, r"client\.head_lr"),
        ({"clip": 0}, r"client\.clip"),
        ({"batch_size": 0}, r"client\.batch_size"),
        ({"batch_size": 2.5}, r"client\.batch_size"),
        ({"epochs": 0}, r"client\.epochs"),
        ({"epochs": 1.5}, r"client\.epochs"),
        ({"steps": -3}, r"client\.steps"),
        ({"steps": 2.5}, r"client\.steps"),
        ({"micro_tokens": 0}, r"client\.micro_tokens"),
        ({"lr": float("inf")}, r"client\.lr"),
        ({"schedule": "step"}, r"client\.schedule: expected constant, linear or cosine, got 'step'"),
        ({"warmup": 1.5}, r"client\.warmup: expected a share from 0 to 1, got 1\.5"),
        ({"warmup": float("nan")}, r"client\.warmup"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LocalTraining(**{"lr": 0.1, **settings})
