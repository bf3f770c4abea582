"""What a step of local training holds: batches of rows or of tokens, one or several."""

import dataclasses
from typing import Any

import pytest
import torch

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, MultiAdapterModel, fresh_adapter, targets
from fedlora.privacy import DPSGD
from fedlora.training.client import TrainRequest

LENGTHS = (3, 9, 4, 4, 12, 2, 5, 30, 3, 6, 7)
ROWS = [Example([5 + (3 * i + j) % 90 for j in range(n)], i % 2) for i, n in enumerate(LENGTHS)]
CLIENT = LocalTraining(lr=0.1, batch_size=2)


def work(task: Task | None = None, rows: list[Example] = ROWS) -> TrainRequest:
    return TrainRequest(0, 1, 0, task or Task(Adapter({})), rows)


def flat(batches: list[list[Example]]) -> list[Example]:
    return [row for batch in batches for row in batch]


def test_a_step_holds_so_many_batches_in_their_order_and_the_last_of_a_pass_what_is_left() -> None:
    single = dataclasses.replace(CLIENT, epochs=2).batches(work())
    found = dataclasses.replace(CLIENT, epochs=2, accumulate=4).batches(work())
    assert [len(rows) for rows in found] == [8, 3, 8, 3]
    assert flat(found) == flat(single)


def test_steps_are_those_of_the_optimizer() -> None:
    found = dataclasses.replace(CLIENT, steps=3, accumulate=4).batches(work())
    assert [len(rows) for rows in found] == [8, 3, 8]
    assert dataclasses.replace(CLIENT, accumulate=4).count_steps(11) == 2


def test_an_accumulated_step_goes_by_the_mean_over_all_rows_of_its_batches(base: Base) -> None:
    shapes = targets(base, "query")
    task = Task(fresh_adapter(base, shapes, LoRA().peer(0, 2, shapes), base.heads))
    client = LocalTraining(
        lr=0.1,
        batch_size=2,
        accumulate=3,
        steps=1,
        clip=None,
        optimizer=lambda groups: torch.optim.SGD(groups),
    )
    rows = ROWS[:5]  # batches of 2, 2 and 1: a mean of the batches' means would be another
    [result] = client.train(base, [work(task, rows)])
    assert result.metrics["steps"] == 1.0

    batches = [rows[:2], rows[2:4], rows[4:]]
    with MultiAdapterModel(base, [task], train=True) as bank:
        found = bank.parameters(0)
        trained = {name: p for name, p in found.items() if p.requires_grad}
        for batch in batches:
            bank.route([len(batch)])
            loss = base.losses(base.collate(batch))[0].sum() / len(rows)
            grads = torch.autograd.grad(loss, list(trained.values()))
            for parameter, grad in zip(trained.values(), grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        before = {name: p.detach().clone() for name, p in trained.items()}
        steps = {name: p.grad for name, p in trained.items()}
    moved = dict(result.adapter.tensors())
    for name, start in before.items():
        rate = 0.1 if name in {f"{m}.{f}" for m in shapes for f in "AB"} else client.head_lr
        assert steps[name] is not None
        torch.testing.assert_close(moved[name], start - rate * steps[name], rtol=1e-4, atol=1e-6)


def test_a_batch_takes_rows_while_they_hold_no_more_tokens_than_that() -> None:
    found = dataclasses.replace(CLIENT, max_tokens=12).batches(work())
    order = flat(LocalTraining(lr=0.1).batches(work()))
    assert flat(found) == order
    for batch, after in zip(found, [*found[1:], []], strict=True):
        tokens = sum(row.size for row in batch)
        assert tokens <= 12 or len(batch) == 1
        assert not after or tokens + after[0].size > 12
    assert max(len(batch) for batch in found) > 1
    assert [row.size for batch in found if len(batch) == 1 for row in batch].count(30) == 1


def test_batches_of_tokens_accumulate_and_go_round_too() -> None:
    client = dataclasses.replace(CLIENT, max_tokens=12)
    single = client.batches(work())
    found = dataclasses.replace(client, accumulate=2).batches(work())
    assert found == [flat(single[i : i + 2]) for i in range(0, len(single), 2)]
    more = dataclasses.replace(client, steps=len(single) + 2).batches(work())
    assert len(more) == len(single) + 2
    assert more[: len(single)] == single
    assert client.batches(work(rows=[])) == []


def test_the_tokens_of_a_step_follow() -> None:
    assert dataclasses.replace(CLIENT, accumulate=3).step_tokens(ROWS) == -(-6 * sum(LENGTHS) // 11)
    assert dataclasses.replace(CLIENT, max_tokens=12, accumulate=3).step_tokens(ROWS) == 36
    assert dataclasses.replace(CLIENT, max_tokens=500).step_tokens(ROWS) == sum(LENGTHS)


def test_a_private_step_expects_the_rows_of_all_its_batches() -> None:
    private = LocalTraining(lr=0.1, batch_size=4, accumulate=3, steps=5).privately(
        DPSGD(epsilon=8.0, participations=2, accountant="rdp")
    )
    same = LocalTraining(lr=0.1, batch_size=12, steps=5).privately(private.privacy)
    plan = private.plan(60)
    assert plan is not None
    assert plan == same.plan(60)
    assert (plan.batch_size, plan.q) == (12, 0.2)
    with pytest.raises(ConfigError, match=r"client\.batch_size or client\.accumulate"):
        private.plan(11)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("accumulate", "max_tokens") for value in (0, -1, 1.5)]
    + [("accumulate", None), ("batch_size", None)],
)
def test_what_is_no_number_of_batches_or_tokens_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"client.{name}: expected a whole number of at least 1"):
        LocalTraining(lr=0.1, **{name: value})


def test_batches_of_tokens_do_not_go_with_privacy() -> None:
    with pytest.raises(ConfigError, match=r"client\.max_tokens: .*leave it out"):
        LocalTraining(lr=0.1, max_tokens=99).privately(DPSGD())
