"""raFLoRA: each direction is the mean over the clients whose rank reaches it; nobody's stays as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.strategies import RaFLoRA

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
held = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=5)


def aggregate(pairs, weights, old):
    updates = [
        Update(Adapter({"m": pair}), w, Peer(k, pair.rank))
        for k, (pair, w) in enumerate(zip(pairs, weights, strict=True))
    ]
    return RaFLoRA().aggregate(State(Adapter({"m": old})), updates, np.random.default_rng(0))


def by_levels(np64, pairs, weights, levels, old):
    """The paper's sum over partitions l..h of the candidate ranks, the old content where nobody holds one."""
    total = np.zeros(old.shape)
    for low, high in zip([0, *levels], [*levels, 10**6], strict=False):
        part = slice(low, high)
        holders = [(p, w) for p, w in zip(pairs, weights, strict=True) if p.rank >= high and w > 0]
        N = sum(w for _, w in holders)
        for p, w in holders:
            total += w / N * np64.delta(Pair(p.A[part], p.B[:, part], p.scale))
        if not holders:
            total += np64.delta(Pair(old.A[part], old.B[:, part], old.scale))
    return total


def test_the_facts():
    assert (RaFLoRA.mixed_ranks, RaFLoRA.linear, RaFLoRA.exact) == (True, False, False)


@given(seed=seeds, d_out=dims, d_in=dims, held=held, more=st.sets(st.integers(1, 14)), old=st.integers(1, 14))
def test_it_is_the_papers_sum_for_any_candidates_that_hold_all_ranks(
    make, np64, seed, d_out, d_in, held, more, old
):
    # So no list of candidates is needed: those of absent clients change nothing, nor does every rank as one.
    rng = np.random.default_rng(seed)
    pairs, weights = [make.pair(rng, d_out, d_in, r, s) for r, s, _ in held], [w for _, _, w in held]
    old, ranks = make.pair(rng, d_out, d_in, old, 2.0), {p.rank for p in pairs}
    state = aggregate(pairs, weights, old)
    for levels in (sorted(ranks), sorted(ranks | more), range(1, 15)):
        assert np64.close(state.delta("m"), by_levels(np64, pairs, weights, levels, old))
    assert state.adapter.pairs["m"].scale == 2.0


def test_candidates_that_skip_a_rank_would_be_another_mean(make, np64, rng):
    pairs, old = [make.pair(rng, 7, 9, r) for r in (4, 6, 8)], make.pair(rng, 7, 9, 8)
    got = aggregate(pairs, [1.0, 2.0, 3.0], old).delta("m")
    assert not np64.close(got, by_levels(np64, pairs, [1.0, 2.0, 3.0], [4, 8], old), 1e-3)


@given(seed=seeds, held=held)
def test_with_one_rank_it_is_flexlora(make, np64, seed, held):
    rng = np.random.default_rng(seed)
    pairs, weights = [make.pair(rng, 7, 9, 4, s) for _, s, _ in held], [w for _, _, w in held]
    total = sum(weights)
    mean = np64.sum(pairs, [w / total for w in weights])
    assert np64.close(aggregate(pairs, weights, make.pair(rng, 7, 9, 4)).delta("m"), mean)


def test_a_partition_that_only_clients_of_weight_zero_hold_stays_too(make, np64, rng):
    pairs, old = [make.pair(rng, 7, 9, r) for r in (2, 5)], make.pair(rng, 7, 9, 6, 0.3)
    want = np64.delta(pairs[0]) + np64.delta(Pair(old.A[2:], old.B[:, 2:], old.scale))
    assert np64.close(aggregate(pairs, [1.0, 0.0], old).delta("m"), want)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_a_round_without_learning_is_the_identity_whoever_is_sampled(make, np64, rng, shape):
    ra, state = RaFLoRA(), State(Adapter({"m": make.pair(rng, *shape, 6, 2.0)}))
    start = state.delta("m")
    for ranks in ((6, 2, 1), (1,), (2, 5), (8, 3), (6,)):
        peers = [Peer(k, r, {}, {"m": 16.0 / r}) for k, r in enumerate(ranks)]
        state = ra.aggregate(
            state, make.round(rng, ra, state, peers, [1.0, 2.0, 3.0][: len(peers)], 0.0), rng
        )
        assert np64.close(state.delta("m"), start, 1e-12)


def test_a_direction_moves_as_far_as_its_holders_moved_it(make, np64, rng):
    # FlexLoRA would move it p_i as far.
    D = make.spectrum(rng, 9, 8, [4.0, 3.0, 2.0])
    small, large = (
        Pair(D.A[:1], D.B[:, :1]),
        Pair(D.A, D.B * torch.tensor([1.0, 1.0, 1.5], dtype=torch.float64)),
    )
    got = aggregate([small, large], [0.9, 0.1], D).adapter.pairs["m"]
    assert np64.close(np64.delta(got), np64.delta(large), 1e-12)


def test_what_is_handed_out_is_in_the_order_of_singular_values(make, np64, rng):
    state = aggregate(
        [make.pair(rng, 7, 9, r, 2.0) for r in (2, 4)], [0.5, 0.5], make.pair(rng, 7, 9, 6, 2.0)
    )
    task = RaFLoRA().task(state, Peer(0, 9, {}, {"m": 0.5})).adapter.pairs["m"]
    S = np.linalg.svd(state.delta("m").numpy(), compute_uv=False)
    assert np64.orthonormal_rows(task.A)
    assert np64.close(0.5 * task.B.norm(dim=0), np.pad(S[:7], (0, 2)))
    assert np64.close(RaFLoRA().task(state, Peer(1, 2)).adapter.pairs["m"].A, task.A[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_costs_its_rounding(make, np64, rng, dtype):
    pairs, old = [make.pair(rng, 7, 9, r, 2.0, dtype) for r in (1, 3)], make.pair(rng, 7, 9, 5, 2.0, dtype)
    got = aggregate(pairs, [1.0, 3.0], old)
    assert got.adapter.pairs["m"].A.dtype == dtype
    want = by_levels(np64, pairs, [1.0, 3.0], [1, 3], old)
    assert np64.close(np64.delta(got.adapter.pairs["m"]), want, 3 * torch.finfo(dtype).eps)
