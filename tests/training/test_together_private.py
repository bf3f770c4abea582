"""DP-SGD of clients in stacks: each gets what it gets by itself, to the bit of its noise."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import base_of
from torch import Tensor
from torch.func import functional_call

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ModelError
from fedlora.models import Base, per_row, targets
from fedlora.models.memory import Memory
from fedlora.models.products import Grouped, OneByOne, Products
from fedlora.models.stacks import Stacks
from fedlora.privacy import Mechanism, Source, self_test
from fedlora.privacy.stacked import PrivateStacks
from fedlora.training import gradients
from fedlora.training.rules import RankPruning
from fedlora.training.steps import FitJob, Parameters
from fedlora.training.trainer import FitResult, fit

CLIENT = LocalTraining(lr=0.05, optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.5), clip=None)


def rows(base: Base, count: int, seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, 60, (2 + (5 * i + seed) % 9,), generator=draw).tolist()
        found.append(Example(ids, i % 3 if base.heads else [-100, *ids[1:]]))
    return found


def job(base: Base, seed: int, rank: int, batches: Sequence[int], sigma: float = 0.7, **more: Any) -> FitJob:
    draw = torch.Generator().manual_seed(seed)
    dtype = base.model.dtype
    pairs = {
        n: Pair(
            0.3 * torch.randn(rank, i, generator=draw, dtype=dtype),
            0.3 * torch.randn(o, rank, generator=draw, dtype=dtype),
            1 / (1 + seed),
        )
        for n, (o, i) in targets(base, "all-linear").items()
    }
    task = Task(Adapter(pairs, {n: p.to(dtype) for n, p in base.head_state().items()}), **more)
    mechanism = Mechanism(sigma * (1 + seed), 0.3 + seed / 10, 3 + seed, Source(f"client {seed}"))
    return FitJob(task, [rows(base, size, 10 * seed + at) for at, size in enumerate(batches)], mechanism)


# Of several ranks, batches and numbers of steps: some are empty, one client has nothing else, one no step.
CLIENTS: tuple[tuple[int, Sequence[int]], ...] = (
    (3, (4, 0, 2)),
    (16, (0, 5)),
    (1, (2, 6, 1)),
    (8, (0,)),
    (2, ()),
)


def jobs(base: Base, sigma: float = 0.7, **more: Any) -> list[FitJob]:
    return [job(base, seed, rank, sizes, sigma, **more) for seed, (rank, sizes) in enumerate(CLIENTS)]


def trained(base: Base, work: Sequence[FitJob], client: LocalTraining = CLIENT) -> list[FitResult]:
    return fit(base, work, client.make_optimizer, client.rate_factor, None, client.micro_tokens)


def compare(one: FitResult, other: FitResult, tol: float) -> None:
    assert math.isclose(one.loss, other.loss, rel_tol=tol, abs_tol=tol)
    assert one.steps == other.steps
    assert one.clipped == other.clipped
    mine, theirs = dict(one.adapter.tensors()), dict(other.adapter.tensors())
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
        )


WAYS = [(OneByOne(), torch.float64, 1e-10), (Grouped(), torch.float32, 2e-4)]


@pytest.mark.parametrize(("way", "dtype", "tol"), WAYS, ids=["one by one", "grouped"])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_each_client_is_trained_as_by_itself(
    family: str, way: Products, dtype: torch.dtype, tol: float
) -> None:
    base = base_of(family, dtype)
    client = replace(CLIENT, micro_tokens=20, schedule="cosine")
    apart = [trained(base, [jobs(base)[k]], client)[0] for k in range(len(CLIENTS))]
    together = trained(replace(base, products=way), jobs(base), client)
    alone = trained(replace(base, products=way), [jobs(base)[2]], client)[0]
    for one, other in zip(together, apart, strict=True):
        compare(one, other, tol)
    compare(alone, apart[2], tol)
    assert together[0].clipped is not None
    assert 0 < together[0].clipped <= 1


def test_the_noise_is_that_of_the_client_alone_to_the_bit() -> None:
    base = base_of("Bert", torch.float32)
    work = [job(base, seed, rank, (0, 0)) for seed, rank in enumerate((3, 16, 8))]
    apart = [trained(base, [one])[0] for one in work]
    again = [job(base, seed, rank, (0, 0)) for seed, rank in enumerate((3, 16, 8))]
    for one, other, own in zip(trained(replace(base, products=Grouped()), again), apart, work, strict=True):
        assert one.adapter.digest() == other.adapter.digest() != own.task.adapter.digest()


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
            torch.testing.assert_close(before - after[name], step, rtol=1e-4, atol=1e-9)


def test_what_is_not_trained_stays_and_gets_no_noise() -> None:
    base = base_of("Bert", torch.float32)
    frozen = frozenset({sorted(targets(base, "all-linear"))[0]})
    more: dict[str, Any] = {"train": frozenset({"B", "head"}), "frozen": frozen}
    apart = [trained(base, [jobs(base, **more)[k]])[0] for k in range(3)]
    together = trained(replace(base, products=Grouped()), jobs(base, **more))
    for one, other, own in zip(together, apart, jobs(base, **more), strict=False):
        compare(one, other, 2e-4)
        before, after = dict(own.task.adapter.tensors()), dict(one.adapter.tensors())
        for name in before:
            assert torch.equal(before[name], after[name]) == (name not in set(own.task.trained())), name


def test_a_rule_s_term_comes_after_the_noise() -> None:
    base = base_of("Llama", torch.float64)
    more = {"method": (RankPruning(0.5, 10.0, 1),)}
    for one, k in zip(
        trained(replace(base, products=OneByOne()), jobs(base, **more)), range(3), strict=False
    ):
        compare(one, trained(base, [jobs(base, **more)[k]])[0], 1e-10)


class Mine(torch.optim.SGD):
    """An optimizer of which nobody knows what it does."""


def test_an_optimizer_of_the_user_s_own_moves_noised_gradients_client_by_client() -> None:
    base = base_of("Bert", torch.float64)

    def make(groups: Parameters) -> torch.optim.Optimizer:
        return Mine([p for found in groups.values() for p in found], lr=0.1)

    apart = [fit(base, [jobs(base)[k]], make)[0] for k in range(len(CLIENTS))]
    for one, other in zip(fit(replace(base, products=OneByOne()), jobs(base), make), apart, strict=True):
        compare(one, other, 1e-10)


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
