"""HetLoRA's rule: a penalty that pulls on the tail, and when the tail is pruned."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.training.rules import RankPruning

LAYERS = {"first": (4, 6), "second": (6, 5)}


@pytest.mark.parametrize(
    ("gamma", "rank", "start", "pruned"),
    [
        (0.99, 8, 7, 7),
        (0.99, 100, 99, 99),
        (0.5, 5, 2, 3),
        (0.5, 2, 1, 2),
        (0.29, 100, 29, 29),  # 0.29 · 100 = 28.999…
        (0.9, 1, 0, 1),
        (1 - 1e-11, 1, 0, 1),
        (1 - 1e-11, 200, 199, 199),
    ],
)
def test_a_tail_is_never_empty_and_a_pruning_never_goes_below_the_least(gamma, rank, start, pruned):
    rule = RankPruning(gamma, 0.1, 3)
    assert rule.start(rank) == start < rank
    assert rule.pruned(rank) == pruned >= min(3, rank)


@pytest.mark.parametrize(("gamma", "rank"), [(0.5, 7), (0.99, 8), (0.99, 1)])
def test_the_penalty_has_a_gradient_on_the_tail_and_nowhere_else(make, np64, rng, gamma, rank):
    adapter, cut = make.adapter(rng, LAYERS, rank), int(np.floor(gamma * rank))
    tensors = dict(adapter.tensors())
    found = RankPruning(gamma, 0.3, 1).gradient(tensors, {})
    assert found.keys() == {f"{m}.{f}" for m in LAYERS for f in "AB"}
    for m, pair in adapter.pairs.items():
        a, b = pair.A.numpy().copy(), pair.B.numpy().copy()
        a[:cut], b[:, :cut] = 0, 0
        a_norm, b_norm = np.linalg.norm(a), np.linalg.norm(b)
        assert a_norm > 0
        assert np64.close(found[f"{m}.A"], 0.3 * b_norm * a / a_norm)
        assert np64.close(found[f"{m}.B"], 0.3 * a_norm * b / b_norm)
    assert not any(tensor.requires_grad for tensor in (*tensors.values(), *found.values()))


def test_a_tail_that_is_zero_does_not_break_the_gradient(make, rng):
    pair = make.pair(rng, 4, 6, 3)
    found = RankPruning(0.5, 0.1, 1).gradient({"m.A": pair.A, "m.B": torch.zeros_like(pair.B)}, {})
    assert all(torch.isfinite(term).all() for term in found.values())


def test_a_head_or_a_factor_alone_has_no_tail(make, rng):
    adapter = make.adapter(rng, LAYERS, 3)
    rule = RankPruning(0.5, 0.1, 1)
    assert rule.gradient(dict(adapter.extra), {}) == {}
    assert rule.gradient({"first.B": adapter.pairs["first"].B}, {}) == {}


@pytest.mark.parametrize(("factor", "prunes"), [(0.99, True), (1.0, False), (1.01, False)])
def test_pruning_asks_for_a_tail_that_is_strictly_lighter_over_all_modules(make, rng, factor, prunes):
    start = make.adapter(rng, LAYERS, 4)
    pairs = {}
    for m, pair in start.pairs.items():
        B = pair.B.clone()
        B[:, 2:] *= factor  # the head of the pair may do what it likes
        B[:, :2] *= 5.0
        pairs[m] = Pair(pair.A, B, pair.scale)
    got = RankPruning(0.5, 0.0, 1).finish(Adapter(pairs, start.extra), start)
    assert {p.rank for p in got.pairs.values()} == {2 if prunes else 4}
    assert all(torch.equal(p.A, pairs[m].A[: p.rank]) for m, p in got.pairs.items())


def test_a_reply_may_have_the_ranks_of_one_pruning(make, rng):
    adapter = make.adapter(rng, LAYERS, 4)
    [other] = RankPruning(0.5, 0.0, 1).replies(adapter)
    assert {p.rank for p in other.pairs.values()} == {2}
    assert other.extra.keys() == adapter.extra.keys()


# --- in training --------------------------------------------------------------------------------------------


def penalty(adapter: Adapter, rule: RankPruning) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The paper's formula by autograd, and its leaves."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors()}
    total = torch.zeros(())
    for m, pair in adapter.pairs.items():
        cut = int(rule.gamma * pair.rank)
        total = total + leaves[f"{m}.B"][:, cut:].norm() * leaves[f"{m}.A"][cut:].norm()
    return rule.penalty * total, leaves


def test_clients_of_one_pass_are_moved_each_by_its_own_tail_and_nothing_else(bench: Any) -> None:
    rule, adapters = RankPruning(0.5, 0.3, 4), [bench.start(4, 1), bench.start(3, 2)]
    plain = [bench.work(Task(a), client=i, rows=4) for i, a in enumerate(adapters)]
    client = replace(bench.client, lr=1.0)
    free = client.train(bench.base, plain)
    pressed = client.train(bench.base, [replace(a, task=replace(a.task, method=(rule,))) for a in plain])
    for before, one, other in zip(adapters, free, pressed, strict=True):
        total, leaves = penalty(before, rule)
        total.backward()  # type: ignore[no-untyped-call]
        after = dict(other.adapter.tensors())
        for name, tensor in one.adapter.tensors():
            grad = leaves[name].grad
            want = torch.zeros_like(tensor) if grad is None else grad
            torch.testing.assert_close(tensor - after[name], want, rtol=1e-9, atol=1e-12)
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-9)


@pytest.mark.parametrize(("least", "rank"), [(1, 2), (3, 3), (4, 4), (9, 4)])
def test_a_tail_that_training_made_lighter_is_pruned_but_not_below_the_least(
    bench: Any, least: int, rank: int
) -> None:
    task = Task(bench.start(4), method=(RankPruning(0.5, 1.0, least),))
    found = bench.train(task)
    assert {pair.rank for pair in found.pairs.values()} == {rank}
    assert found.extra.keys() == task.adapter.extra.keys()


def test_without_training_nothing_is_lighter_and_nothing_pruned(bench: Any) -> None:
    task = Task(bench.start(4), method=(RankPruning(0.5, 1.0, 1),))
    assert bench.train(task, rows=0).digest() == task.adapter.digest()


def test_a_head_alone_is_trained_and_not_pruned(bench: Any) -> None:
    task = Task(Adapter({}, bench.base.head_state()), method=(RankPruning(0.5, 1.0, 1),))
    found = bench.train(task)
    assert found.pairs == {}
    assert not torch.equal(found.extra["classifier.weight"], task.adapter.extra["classifier.weight"])
