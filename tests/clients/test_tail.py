"""HetLoRA's tail at the client: a penalty that pulls, and when it prunes."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.clients.local import pruned
from fedlora.core.adapter import Adapter, Pair
from fedlora.training.rules import RankPruning
from fedlora.training.trainer import _press

LAYERS = {"first": (4, 6), "second": (6, 5)}


@pytest.mark.parametrize(("gamma", "rank"), [(0.5, 7), (0.99, 8), (0.99, 1)])
def test_the_penalty_has_a_gradient_on_the_tail_and_nowhere_else(make, np64, rng, gamma, rank):
    tail, pairs = RankPruning(gamma, 0.3, 1), [make.pair(rng, 4, 6, rank), make.pair(rng, 6, 5, rank)]
    factors = {
        "A": [nn.Parameter(pair.A.clone()) for pair in pairs],
        "B": [nn.Parameter(pair.B.clone()) for pair in pairs],
    }
    _press(factors, tail)
    start = int(np.floor(gamma * rank))
    for pair, A, B in zip(pairs, factors["A"], factors["B"], strict=True):
        a, b = pair.A.numpy().copy(), pair.B.numpy().copy()
        a[:start], b[:, :start] = 0, 0
        a_norm, b_norm = np.linalg.norm(a), np.linalg.norm(b)
        assert a_norm > 0
        assert np64.close(A.grad, 0.3 * b_norm * a / a_norm)
        assert np64.close(B.grad, 0.3 * a_norm * b / b_norm)


def test_a_tail_that_is_zero_does_not_break_the_gradient(make, rng):
    pair = make.pair(rng, 4, 6, 3)
    A, B = nn.Parameter(pair.A), nn.Parameter(torch.zeros_like(pair.B))
    _press({"A": [A], "B": [B]}, RankPruning(0.5, 0.1, 1))
    assert torch.isfinite(A.grad).all()
    assert torch.isfinite(B.grad).all()


@pytest.mark.parametrize(("factor", "prunes"), [(0.99, True), (1.0, False), (1.01, False)])
def test_pruning_asks_for_a_tail_that_is_strictly_lighter_over_all_modules(make, rng, factor, prunes):
    start = make.adapter(rng, LAYERS, 4)
    pairs = {}
    for m, pair in start.pairs.items():
        B = pair.B.clone()
        B[:, 2:] *= factor  # the head of the pair may do what it likes
        B[:, :2] *= 5.0
        pairs[m] = Pair(pair.A, B, pair.scale)
    got = pruned(Adapter(pairs, start.extra), start, RankPruning(0.5, 0.0, 1))
    assert {p.rank for p in got.pairs.values()} == {2 if prunes else 4}
    assert all(torch.equal(p.A, pairs[m].A[: p.rank]) for m, p in got.pairs.items())
