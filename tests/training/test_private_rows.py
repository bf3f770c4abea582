"""Rows' own gradients, clipped: by definition, within memory, whatever a row or a layer is like."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from private_jobs import CLIENT, compare, job, jobs, trained
from small_models import base_of
from torch import Tensor
from torch.func import functional_call

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ModelError
from fedlora.models import Base, Traits, per_row
from fedlora.models.memory import Memory
from fedlora.models.products import Grouped, OneByOne, Products
from fedlora.models.stacks import Stacks
from fedlora.privacy import self_test
from fedlora.privacy.stacked import PrivateStacks
from fedlora.training import gradients
from fedlora.training.batches import micro_batches
from fedlora.training.steps import FitJob


def dense(base: Base, one: FitJob) -> dict[str, Tensor]:
    """The step by definition: each row's gradient by dense weights and autograd, clipped and added up."""
    assert one.mechanism is not None
    adapter = one.task.adapter
    total, longer = {name: torch.zeros_like(value) for name, value in adapter.tensors()}, list[bool]()
    for row in one.batches[0]:
        own = {name: value.clone().requires_grad_() for name, value in adapter.tensors()}
        weights = {
            f"{n}.weight": base.model.get_submodule(n).weight + p.scale * own[f"{n}.B"] @ own[f"{n}.A"]
            for n, p in adapter.pairs.items()
        }
        heads = {name: own[name] for name in adapter.extra}
        ids = torch.tensor([row.input_ids])
        logits = functional_call(base.model, weights | heads, (ids,)).logits[0]
        if base.heads:
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target))
        else:
            loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row.target[1:]))
        grads = torch.autograd.grad(loss, list(own.values()))
        norm = float(torch.cat([g.reshape(-1) for g in grads]).norm())
        longer.append(norm > one.mechanism.clip)
        for name, grad in zip(own, grads, strict=True):
            total[name] += grad * min(1.0, one.mechanism.clip / norm)
    assert any(longer)
    return {name: value / one.mechanism.batch_size for name, value in total.items()}


@pytest.mark.parametrize("way", [None, OneByOne()], ids=["apart", "in stacks"])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_a_step_is_the_sum_of_clipped_gradients_by_dense_autograd(
    family: str, way: Products | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_row, "SMALL", 0)  # so that rows lie end to end without stacks too
    base = replace(base_of(family), products=way)
    work = [job(base, seed, rank, (5,), 0.0) for seed, rank in ((0, 3), (1, 8))]
    client = replace(CLIENT, lr=1.0, head_lr=1.0, optimizer=torch.optim.SGD)
    for one, found in zip(work, trained(base, work, client), strict=True):
        after = dict(found.adapter.tensors())
        for name, step in dense(base, one).items():
            before = dict(one.task.adapter.tensors())[name]
            torch.testing.assert_close(before - after[name], step, rtol=1e-4, atol=1e-6)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=30),
    tokens=st.none() | st.integers(1, 200),
    most=st.integers(1, 5),
    padded=st.booleans(),
)
def test_micro_batches_hold_no_more_rows_than_they_may(
    lengths: list[tuple[int, int]], tokens: int | None, most: int, padded: bool
) -> None:
    pool = [(slot, Example([number] * length, 0)) for number, (slot, length) in enumerate(lengths)]
    found = micro_batches(pool, tokens, Traits(), padded, most)
    assert sorted((item for micro in found for item in micro), key=repr) == sorted(pool, key=repr)
    assert all(1 <= len(micro) <= most for micro in found)
    free = micro_batches(pool, tokens, Traits(), padded)
    assert micro_batches(pool, tokens, Traits(), padded, len(pool) + 1) == free


@pytest.mark.parametrize("stacked", [False, True])
def test_no_more_rows_are_together_than_their_gradients_have_room(
    stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(base_of("Bert"), products=OneByOne() if stacked else None)
    plain = trained(base, jobs(base))
    sizes: list[int] = []
    kind = gradients.ClippedTogether if stacked else gradients.ClippedApart
    take = kind.take

    def counted(self: Any, loss: Tensor, counts: Any) -> Any:
        sizes.append(sum(counts.values()))
        return take(self, loss, counts)

    monkeypatch.setattr(kind, "take", counted)
    trained(base, jobs(base))
    assert max(sizes) > 4
    sizes.clear()
    numbers = 4 * max(sum(t.numel() for _, t in one.task.adapter.tensors()) for one in jobs(base))
    monkeypatch.setattr("fedlora.models.memory.ROWS_ROOM", 3 * numbers)  # and so for 2 rows
    lean = replace(base, memory=Memory())
    for one, other in zip(trained(lean, jobs(base)), plain, strict=True):
        compare(one, other, 1e-10)
    assert max(sizes) <= 2


def test_a_step_that_does_not_fit_is_done_again_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = replace(base_of("Bert"), products=OneByOne(), memory=Memory())
    client = replace(CLIENT, micro_tokens=30)
    plain = trained(base, jobs(base), client)
    add, calls = PrivateStacks.add, [0]

    def full(self: PrivateStacks, *given: Any) -> None:
        add(self, *given)
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(PrivateStacks, "add", full)
    with pytest.warns(UserWarning, match="do not fit the memory"):
        found = trained(base, jobs(base), client)
    for one, other in zip(found, plain, strict=True):
        compare(one, other, 1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_row_that_is_not_finite_is_as_if_it_were_not_there(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(base_of("Bert", torch.float32), products=Grouped())
    work = [job(base, seed, 3, (4,), 0.0) for seed in range(2)]
    less = [replace(one, batches=[one.batches[0][: 4 - (k == 0)]]) for k, one in enumerate(work)]
    want = trained(base, less)
    losses, gone = type(base).losses_unpadded, work[0].batches[0][3]

    def poisoned(self: Base, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        each, right = losses(self, examples)
        factor = torch.tensor([bad if row is gone else 1.0 for row in examples])
        return each * factor, right

    monkeypatch.setattr(type(base), "losses_unpadded", poisoned)
    for one, other in zip(trained(base, work), want, strict=True):
        for name, value in one.adapter.tensors():
            torch.testing.assert_close(value, dict(other.adapter.tensors())[name], rtol=1e-5, atol=1e-7)


def test_a_layer_that_is_never_called_is_refused() -> None:
    base = replace(base_of("Bert", torch.float32), products=Grouped())
    own = job(base, 0, 3, (4,))
    base.model.bert.encoder.layer[0].unused = torch.nn.Linear(16, 16)
    pairs = {"bert.encoder.layer.0.unused": Pair(torch.randn(3, 16), torch.zeros(16, 3), 1.0)}
    adapter = Adapter({**own.task.adapter.pairs, **pairs}, own.task.adapter.extra)
    with pytest.raises(ModelError, match="4 records went in, but 2 of the tensors"):
        trained(base, [replace(own, task=Task(adapter))])


class Words:
    """What the self-test asks of a tokenizer."""

    all_special_ids, eos_token_id = (0, 1, 2), 2

    def __len__(self) -> int:
        return 60


def test_the_self_test_tries_the_way_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = [replace(base_of("Llama", torch.float32), products=Grouped()) for _ in range(2)]
    task = jobs(bases[0])[0].task
    base, other = (replace(one, tokenizer=Words()) for one in bases)
    self_test(base, task)
    right = Grouped.outer

    def wrong(self: Grouped, x: Tensor, y: Tensor, parts: Any) -> Tensor:
        return right(self, x, y, parts).roll(1, 0)

    monkeypatch.setattr(Grouped, "outer", wrong)
    with pytest.raises(ModelError, match="depends on the other records of its batch"):
        self_test(other, task)


def test_slots_of_the_same_ranks_share_where_their_numbers_lie() -> None:
    base = base_of("Bert", torch.float32)
    adapters = [job(base, seed, rank, ()).task.adapter for seed, rank in enumerate((3, 8, 3))]
    trainable = jobs(base)[0].task.trained()
    one, full, three = Stacks(
        adapters, trainable, torch.device("cpu"), torch.float32, OneByOne(), True
    ).indices()
    assert full is None
    assert one is three
    assert one is not None
    pairs = adapters[0].pairs.values()
    assert len(one.unique()) == len(one) == sum(p.A.numel() + p.B.numel() for p in pairs)
