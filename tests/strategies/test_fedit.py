"""FedIT averages factors, which is not averaging updates: by how much is the paper's identity."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import error_and_norm
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.strategies import FedIT


def run(pairs, weights, scale=1.0):
    """One module through one round; the new pair."""
    first = pairs[0]
    state = State(Adapter({"m": Pair(torch.zeros_like(first.A), torch.zeros_like(first.B), scale)}))
    updates = [
        Update(Adapter({"m": pair}), w, Peer(k, pair.rank))
        for k, (pair, w) in enumerate(zip(pairs, weights, strict=True))
    ]
    return FedIT().aggregate(state, updates, np.random.default_rng(0)).adapter.pairs["m"]


def test_the_facts():
    assert (FedIT.mixed_ranks, FedIT.linear, FedIT.exact) == (False, True, False)


@given(
    seed=st.integers(0, 2**32 - 1),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rank=st.integers(1, 12),
    clients=st.integers(1, 5),
    scale=st.floats(0.1, 8),
)
def test_the_error_is_the_weighted_cross_covariance_of_the_factors(
    make, np64, seed, d_out, d_in, rank, clients, scale
):
    rng = np.random.default_rng(seed)
    pairs, w = (
        [make.pair(rng, d_out, d_in, rank, scale) for _ in range(clients)],
        rng.dirichlet([1] * clients),
    )
    A, B = [p.A.numpy() for p in pairs], [p.B.numpy() for p in pairs]
    mean_A, mean_B = np.tensordot(w, A, 1), np.tensordot(w, B, 1)
    cross = sum(w[k] * (B[k] - mean_B) @ (A[k] - mean_A) for k in range(clients))
    half = 0.5 * sum(
        w[i] * w[j] * (B[i] - B[j]) @ (A[i] - A[j]) for i, j in itertools.product(range(clients), repeat=2)
    )
    new = run(pairs, w, scale)
    error = np64.sum(pairs, w) - np64.delta(new)
    assert np64.close(error, scale * cross)
    assert np64.close(error, scale * half)
    assert error_and_norm(pairs, w, new)[0] == pytest.approx(np.linalg.norm(error), abs=1e-10)


def test_the_error_has_rank_at_most_clients_less_one_times_r(make, np64, rng):
    pairs, w = [make.pair(rng, 12, 15, 2) for _ in range(4)], [0.1, 0.2, 0.3, 0.4]
    error = np64.sum(pairs, w) - np64.delta(run(pairs, w))
    assert np.linalg.matrix_rank(error) == 6


def test_random_clients_show_that_it_is_not_the_mean_of_updates(make, np64, rng):
    pairs, w = [make.pair(rng, 8, 6, 3) for _ in range(4)], [0.25] * 4
    ideal = np64.sum(pairs, w)
    assert np.linalg.norm(ideal - np64.delta(run(pairs, w))) > 0.3 * np.linalg.norm(ideal)


@pytest.mark.parametrize("shared", ["A", "B", "both"])
def test_there_is_no_error_where_a_factor_is_shared(make, np64, rng, shared):
    first = make.pair(rng, 8, 6, 3, 2.0)
    pairs = [
        Pair(
            make.tensor(rng, 3, 6) if shared == "B" else first.A,
            make.tensor(rng, 8, 3) if shared == "A" else first.B,
            2.0,
        )
        for _ in range(4)
    ]
    w = [0.1, 0.2, 0.3, 0.4]
    assert np64.close(np64.delta(run(pairs, w, 2.0)), np64.sum(pairs, w), 1e-13)


def test_identical_clients_change_no_factor(make, np64, rng):
    pair = make.pair(rng, 8, 6, 3, 2.0)
    new = run([pair] * 3, [1.0, 2.0, 4.0], 2.0)
    assert np64.close(new.A, pair.A, 1e-15)
    assert np64.close(new.B, pair.B, 1e-15)


def test_every_client_counts_by_its_examples(make, np64, rng):
    # FLoRA's FedIT branch keeps w_0·θ_0 alone (peers.md, 1).
    pairs = [make.pair(rng, 8, 6, 3) for _ in range(3)]
    new = run(pairs, [10, 20, 70])
    assert np64.close(new.A, 0.1 * pairs[0].A + 0.2 * pairs[1].A + 0.7 * pairs[2].A, 1e-14)
    assert np64.close(new.B, 0.1 * pairs[0].B + 0.2 * pairs[1].B + 0.7 * pairs[2].B, 1e-14)


def test_the_same_updates_in_other_scales_give_the_same_mean(make, np64, rng):
    pairs, w = [make.pair(rng, 8, 6, 3, 2.0) for _ in range(3)], [0.2, 0.3, 0.5]
    said = [Pair(p.A, p.B * (2 / s), s) for p, s in zip(pairs, (0.5, 2.0, 7.0), strict=True)]
    one, two = run(pairs, w, 2.0), run(said, w, 2.0)
    assert np64.close(np64.delta(one), np64.delta(two), 1e-13)


@pytest.mark.parametrize("scales", list(itertools.permutations([1.0, 4.0, 9.0])))
def test_the_state_keeps_its_scale_whoever_comes_first(make, rng, scales):
    # Else the next task of a client without scales of its own would depend on who answered.
    pairs = [make.pair(rng, 8, 6, 3, s) for s in scales]
    assert run(pairs, [1.0, 1.0, 1.0], 2.0).scale == 2.0


@pytest.mark.parametrize("ranks", [(8, 1), (1, 8), (8, 4), (4, 8)])
def test_ranks_never_broadcast_in_any_order(make, rng, ranks):
    # Flower: (8, 1) gives shape (8, ·) in silence, (1, 8) raises (peers.md, 10).
    state = State(Adapter({"m": make.pair(rng, 8, 8, 8)}))
    updates = [Update(Adapter({"m": make.pair(rng, 8, 8, r)}), 1.0, Peer(k, r)) for k, r in enumerate(ranks)]
    with pytest.raises(IncompatibleUpdates, match=r"FedIT: client \d sent rank \d for 'm', expected 8"):
        FedIT().aggregate(state, updates, rng)
