"""Private training of K clients in one pass, on tiny models: sums, noise, and each client by itself."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError, ModelError
from fedlora.models import Base
from fedlora.privacy import Mechanism, Source
from fedlora.training.rules import RankPruning
from fedlora.training.steps import FitJob, Parameters
from fedlora.training.trainer import fit

pytestmark = pytest.mark.slow  # whole runs

from_sgd = partial(torch.optim.SGD, lr=1.0)


def sgd(groups: Parameters) -> torch.optim.Optimizer:
    return from_sgd([p for found in groups.values() for p in found])


def adamw(groups: Parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for found in groups.values() for p in found], lr=0.01)


def mechanism(sigma: float = 0.0, clip: float = 0.5, size: int = 4, seed: str | None = "t") -> Mechanism:
    return Mechanism(sigma, clip, size, Source(seed))


def moved(before: Adapter, after: Adapter) -> Tensor:
    """How far all tensors went, as one vector."""
    old = dict(before.tensors())
    return torch.cat([(new - old[name]).reshape(-1).double() for name, new in after.tensors()])


def one_step(base: Base, task: Task, rows: Sequence[Example], mech: Mechanism, tokens: int = 512) -> Tensor:
    [found] = fit(base, [FitJob(task, [rows], mech)], sgd, tokens=tokens)
    return moved(task.adapter, found.adapter)


@pytest.mark.parametrize("train", ["AB", "B"])
@pytest.mark.parametrize("name", ["bert", "llama", "llama-cls"])
def test_a_step_is_the_sum_of_each_record_s_clipped_gradient(zoo: Any, name: str, train: str) -> None:
    base = zoo.base(name, double=True)
    task = Task(zoo.adapter(base, 3), frozenset(train))
    rows = zoo.rows(base, 5, seed=2)
    clip = 0.5
    want = 0.0
    for row in rows:
        [found] = fit(base, [FitJob(task, [[row]])], sgd)  # the ordinary path, a row by itself
        own = moved(task.adapter, found.adapter)
        assert float(own.norm()) > clip  # all are clipped
        want = want + own * clip / float(own.norm())
    for tokens in (1, 512):
        got = one_step(base, task, rows, mechanism(clip=clip, size=4), tokens)
        torch.testing.assert_close(got, want / 4, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_record_more_or_less_moves_a_step_by_at_most_the_clip(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    task = Task(zoo.adapter(base, 3))
    rows, others = zoo.rows(base, 6, seed=2), zoo.rows(base, 4, seed=3, longest=30)
    clip, size = 0.2, 4
    for other in others:
        less = one_step(base, task, rows, mechanism(clip=clip, size=size))
        more = one_step(base, task, [*rows, other], mechanism(clip=clip, size=size))
        assert 0.9 * clip / size < float((more - less).norm()) <= clip / size * (1 + 1e-4)


def jobs(zoo: Any, base: Base, sigma: float) -> list[FitJob]:
    """Four clients of other ranks, batches, clips and noise; some batches are empty, one client has one."""
    found = []
    for k, (rank, sizes) in enumerate(((1, (3, 0, 2, 4)), (5, (0, 5)), (20, (2, 2, 0)), (2, (0,)))):
        rows = zoo.rows(base, sum(sizes), seed=k)
        batches = [[rows.pop() for _ in range(size)] for size in sizes]
        own = Mechanism(sigma * (k + 1), 0.3 + k / 10, 3 + k, Source(f"client {k}"))
        found.append(FitJob(Task(zoo.adapter(base, rank, 1.0 + k, seed=k)), batches, own))
    return found


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2-cls"])
def test_k_at_once_equal_one_by_one(zoo: Any, name: str, sigma: float) -> None:
    base = zoo.base(name, double=True)
    together = fit(base, jobs(zoo, base, sigma), adamw, tokens=40)
    for k, fused in enumerate(together):
        [alone] = fit(base, [jobs(zoo, base, sigma)[k]], adamw, tokens=10**6)
        assert zoo.gap(alone.adapter, fused.adapter) < 1e-7
        assert alone.steps == fused.steps
    assert float(moved(jobs(zoo, base, sigma)[0].task.adapter, together[0].adapter).norm()) > 1e-3


def test_the_number_of_threads_changes_nothing(zoo: Any) -> None:
    base, before = zoo.base("bert", double=True), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 4, 3, 4):
            torch.set_num_threads(threads)
            results.append(fit(base, jobs(zoo, base, 0.7), adamw, tokens=12))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert max(zoo.gap(one.adapter, other.adapter) for other in others) < 1e-9


def test_every_released_tensor_has_the_noise_of_theory_after_empty_and_full_batches(zoo: Any) -> None:
    """dp.md §5: so much noise that the gradient is a ten-thousandth of it."""
    base = zoo.base("bert")
    sigma, clip, size, steps = 1e4, 1e-4, 7, 3
    task = Task(zoo.adapter(base, 4))
    rows = zoo.rows(base, 3, seed=1)
    found: dict[str, list[Tensor]] = {}
    for turn in range(12):
        mech = Mechanism(sigma, clip, size, Source(f"turn {turn}"))
        [one] = fit(base, [FitJob(task, [rows, [], rows[:1]], mech)], sgd)
        old = dict(task.adapter.tensors())
        for name, new in one.adapter.tensors():
            found.setdefault(name, []).append((new - old[name]).double().reshape(-1))
    want = sigma * clip / size * math.sqrt(steps)
    for name, parts in found.items():
        drawn = torch.cat(parts)
        assert float(drawn.std() / want) == pytest.approx(1, abs=5 / math.sqrt(2 * len(drawn))), name


def test_a_frozen_factor_gets_no_noise(zoo: Any) -> None:
    base = zoo.base("bert")
    task = Task(zoo.adapter(base, 3), frozenset("B"))
    [one] = fit(base, [FitJob(task, [[], []], mechanism(sigma=1.0))], sgd)
    after = dict(one.adapter.tensors())
    for name, tensor in task.adapter.tensors():
        assert torch.equal(tensor, after[name]) == name.endswith(".A")


def test_only_empty_batches_are_steps_of_noise(zoo: Any) -> None:
    base = zoo.base("bert")
    task = Task(zoo.adapter(base, 2))
    [one] = fit(base, [FitJob(task, [[], [], []], mechanism(sigma=1.0))], sgd)
    assert one.steps == 3
    assert float(moved(task.adapter, one.adapter).std()) == pytest.approx(0.5 / 4 * math.sqrt(3), rel=0.1)


def test_a_record_that_is_not_finite_is_as_if_it_were_not_there(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo.base("bert", double=True)
    task = Task(zoo.adapter(base, 2))
    rows = zoo.rows(base, 4, seed=1)
    want = one_step(base, task, rows[:3], mechanism())
    losses = type(base).losses

    def poisoned(self: Base, batch: Any) -> tuple[Tensor, Tensor]:
        each, right = losses(self, batch)
        bad = (batch.inputs["input_ids"] == rows[3].input_ids[0])[:, 0]
        assert bad.sum() == 1
        return each * torch.ones_like(each).masked_fill(bad, math.nan), right  # so the others' gradients stay

    monkeypatch.setattr(type(base), "losses", poisoned)
    torch.testing.assert_close(one_step(base, task, rows, mechanism()), want)


def test_the_penalty_of_a_tail_comes_after_the_noise(zoo: Any) -> None:
    """It follows from what is released already, so that it may be as large as it likes."""
    base = zoo.base("bert", double=True)
    adapter = Adapter(zoo.adapter(base, 4, head=False).pairs)
    [plain] = fit(base, [FitJob(Task(adapter), [[]], mechanism(0.0))], sgd)
    tail = RankPruning(0.5, 10.0, 1)
    [pressed] = fit(base, [FitJob(Task(adapter, method=(tail,)), [[]], mechanism(0.0))], sgd)
    assert float(moved(adapter, plain.adapter).norm()) == 0
    assert float(moved(adapter, pressed.adapter).norm()) > 0.5  # not clipped


def test_private_and_other_jobs_do_not_mix_nor_two_clips(zoo: Any) -> None:
    base = zoo.base("bert")
    work = jobs(zoo, base, 1.0)
    with pytest.raises(ConfigError, match="cannot train in one pass"):
        fit(base, [work[0], replace(work[1], mechanism=None)], sgd)
    with pytest.raises(ConfigError, match="second clip"):
        fit(base, work, sgd, clip=1.0)


def test_a_module_that_is_never_called_is_refused(zoo: Any) -> None:
    base = zoo.base("bert")
    known = zoo.adapter(base, 2)
    base.model.bert.encoder.layer[0].unused = torch.nn.Linear(16, 16)
    unused = {"bert.encoder.layer.0.unused": Pair(torch.randn(2, 16), torch.zeros(16, 2), 1.0)}
    adapter = Adapter({**known.pairs, **unused}, known.extra)
    with pytest.raises(ModelError, match="gradients of 0"):
        one_step(base, Task(adapter), zoo.rows(base, 3, seed=1), mechanism())
