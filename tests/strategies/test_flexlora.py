"""FlexLoRA: the server holds the exact mean D*, a client the best approximation of its rank."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import singular_values, truncate
from fedlora.core.messages import Peer, State, Update
from fedlora.strategies import FlexLoRA

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
held = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9)), min_size=1, max_size=5)


def aggregate(pairs, weights, scale=2.0):
    """The state after one round of the given updates of one module."""
    start = State(Adapter({"m": Pair(torch.zeros_like(pairs[0].A), torch.zeros_like(pairs[0].B), scale)}))
    updates = [
        Update(Adapter({"m": pair}), w, Peer(k, pair.rank))
        for k, (pair, w) in enumerate(zip(pairs, weights, strict=True))
    ]
    return FlexLoRA().aggregate(start, updates, np.random.default_rng(0))


def given_to(state, rank, scale=None, id=1):
    """The pair that a client of this rank and scale downloads."""
    peer = Peer(id, rank, {}, {} if scale is None else {"m": scale})
    return FlexLoRA().task(state, peer).adapter.pairs["m"]


def of_spectrum(make, rng, sigma, d_out=9, d_in=8, scale=2.0):
    """A state whose D* has these singular values."""
    pair = make.spectrum(rng, d_out, d_in, sigma)
    return State(Adapter({"m": Pair(pair.A, pair.B / scale, scale)}))


def test_the_facts():
    assert (FlexLoRA.mixed_ranks, FlexLoRA.linear, FlexLoRA.exact) == (True, False, True)


@given(seed=seeds, d_out=dims, d_in=dims, held=held, scale=st.floats(0.1, 9))
def test_the_server_holds_the_exact_mean(make, np64, seed, d_out, d_in, held, scale):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, d_out, d_in, r, s) for r, s in held], list(rng.dirichlet([1] * len(held)))
    state = aggregate(pairs, w, scale)
    assert np64.close(state.delta("m"), np64.sum(pairs, w))
    assert state.adapter.pairs["m"].scale == scale
    assert state.adapter.pairs["m"].rank <= min(d_out, d_in, sum(r for r, _ in held))


@given(seed=seeds, held=held, own=st.floats(0.1, 9))
def test_a_client_of_enough_rank_gets_all_of_it_in_its_own_scale(make, np64, seed, held, own):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, 7, 5, r, s) for r, s in held], list(rng.dirichlet([1] * len(held)))
    state = aggregate(pairs, w)
    for rank in (5, 6, 20):
        pair = given_to(state, rank, own)
        assert (pair.rank, pair.scale) == (rank, own)
        assert np64.close(np64.delta(pair), np64.sum(pairs, w))


@given(seed=seeds, d_out=dims, d_in=dims, held=held, rank=st.integers(1, 12), own=st.floats(0.1, 9))
def test_a_client_gets_the_best_of_its_rank_and_lacks_the_tail(
    make, np64, seed, d_out, d_in, held, rank, own
):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, d_out, d_in, r, s) for r, s in held], list(rng.dirichlet([1] * len(held)))
    D = np64.sum(pairs, w)
    pair = given_to(aggregate(pairs, w), rank, own)
    tail = np.sqrt((np.linalg.svd(D, compute_uv=False)[rank:] ** 2).sum())
    assert np.linalg.norm(D - np64.delta(pair)) == pytest.approx(tail, abs=1e-9)


def test_no_other_matrix_of_the_rank_does_better(make, np64, rng):
    pairs, w = [make.pair(rng, 7, 9, r, s) for r, s in ((1, 4.0), (3, 2.0), (6, 0.5))], [0.2, 0.3, 0.5]
    D, pair = np64.sum(pairs, w), given_to(aggregate(pairs, w), 3)
    error = np.linalg.norm(D - np64.delta(pair))
    for step in (1e-4, 1e-2, 1.0):
        for _ in range(200):
            near = Pair(
                pair.A + step * make.tensor(rng, 3, 9), pair.B + step * make.tensor(rng, 7, 3), pair.scale
            )
            assert np.linalg.norm(D - np64.delta(near)) >= error
    for sent in pairs[1:]:
        assert np.linalg.norm(D - np64.delta(truncate(sent, 3))) >= error


def test_clients_are_nested(make, rng):
    state = aggregate([make.pair(rng, 7, 9, r, 2.0) for r in (2, 4)], [0.5, 0.5])
    small, large = given_to(state, 2, 8.0), given_to(state, 9, 0.5)
    assert torch.equal(small.A, large.A[:2])
    assert torch.allclose(8.0 * small.B, 0.5 * large.B[:, :2], rtol=1e-14, atol=0)
    # Fresh directions too: all clients of a round see the same ones.
    assert torch.allclose(given_to(state, 8, id=2).A, large.A[:8], rtol=0, atol=1e-13)
    assert torch.equal(large.A, given_to(state, 9, 3.0).A)


def test_the_spectrum_comes_in_order_on_orthonormal_rows(make, np64, rng):
    state = aggregate([make.pair(rng, 7, 9, 3, s) for s in (1.0, 5.0)], [0.5, 0.5])
    pair = given_to(state, 8, 0.5)
    assert np64.close(pair.A @ pair.A.T, np.eye(8), 1e-12)
    sigma = singular_values(state.adapter.pairs["m"])[:6]
    assert np64.close(0.5 * pair.B.norm(dim=0), np.pad(sigma, (0, 2)), 1e-12)


def test_all_directions_learn_also_after_a_round_without_any(make, rng):
    state = aggregate([Pair(make.tensor(rng, 4, 9), torch.zeros(7, 4, dtype=torch.float64))] * 2, [0.5, 0.5])
    start = given_to(state, 4)
    B = start.B.clone().requires_grad_()
    ((B @ start.A) * make.tensor(rng, 7, 9)).sum().backward()
    assert (B.grad.norm(dim=0) > 1e-3).all()


def test_fresh_directions_are_the_same_for_the_same_round_and_others_in_the_next(make, rng):
    pair = Pair(torch.eye(1, 9, dtype=torch.float64), torch.ones(7, 1, dtype=torch.float64))
    one, two = State(Adapter({"m": pair, "n": pair}), 1), State(Adapter({"m": pair, "n": pair}), 2)
    assert torch.equal(given_to(one, 4).A, given_to(one, 4).A)
    assert not torch.equal(given_to(one, 4).A, given_to(two, 4).A)
    task = FlexLoRA().task(one, Peer(1, 4)).adapter.pairs
    assert not torch.equal(task["m"].A, task["n"].A)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_a_round_without_learning_at_full_rank_is_the_identity(make, np64, rng, shape):
    state, flex = State(Adapter({"m": make.pair(rng, *shape, 6, 2.0)})), FlexLoRA()
    start, peers = state.delta("m"), [Peer(k, 6, {}, {"m": 0.5 + k}) for k in range(3)]
    for _ in range(5):
        state = flex.aggregate(state, make.round(rng, flex, state, peers, [1.0, 2.0, 3.0], step=0.0), rng)
    assert np64.close(state.delta("m"), start, 1e-12)


def test_mixed_ranks_shrink_what_few_clients_hold(make, np64, rng):
    # Without learning σ_i is multiplied by p_i, the weight of clients whose rank reaches i: rank collapse.
    sigma = [5.0, 4.0, 3.0, 2.0, 1.0]
    state, flex = of_spectrum(make, rng, sigma), FlexLoRA()
    peers = [Peer(1, 1, {}, {"m": 16.0}), Peer(2, 3, {}, {"m": 16 / 3}), Peer(3, 5, {}, {"m": 16 / 5})]
    held = np.array([1.0, 0.8, 0.8, 0.5, 0.5])
    U, S, Vh = np.linalg.svd(state.delta("m").numpy(), full_matrices=False)
    for done in range(1, 4):
        state = flex.aggregate(state, make.round(rng, flex, state, peers, [2.0, 3.0, 5.0], step=0.0), rng)
        want = (U[:, :5] * (S[:5] * held**done)) @ Vh[:5]
        assert np64.close(state.delta("m"), want)


@given(seed=seeds, held=held)
def test_the_gauge_and_the_order_of_clients_change_nothing(make, np64, seed, held):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, 7, 9, r, s) for r, s in held], list(rng.dirichlet([1] * len(held)))
    turned = []
    for pair in pairs:
        G = make.tensor(rng, pair.rank, pair.rank) + 5 * torch.eye(pair.rank, dtype=torch.float64)
        turned.append(Pair(torch.linalg.solve(G, pair.A), pair.B @ G, pair.scale))
    order = rng.permutation(len(pairs))
    permuted = aggregate([pairs[k] for k in order], [w[k] for k in order])
    for other in (aggregate(turned, w), permuted):
        assert np64.close(other.delta("m"), aggregate(pairs, w).delta("m"), 1e-9)


def test_constant_alpha_is_not_one_scale_for_all(make, np64, rng):
    # One alpha / r for every client is off by more than half (algorithms.md, 1.5).
    ranks, w = (1, 2, 4, 6, 8), [0.2] * 5
    pairs = [make.pair(rng, 12, 10, r, 16 / r) for r in ranks]
    D = np64.sum(pairs, w)
    wrong = np64.sum([Pair(p.A, p.B, 16 * 5 / sum(ranks)) for p in pairs], w)
    assert np.linalg.norm(wrong - D) > 0.5 * np.linalg.norm(D)
    assert np64.close(aggregate(pairs, w).delta("m"), D)


def test_the_rank_of_the_state_is_that_of_the_mean(make, rng):
    pair = make.pair(rng, 20, 30, 3)
    assert aggregate([pair] * 4, [0.25] * 4).adapter.pairs["m"].rank == 3
    assert aggregate([make.pair(rng, 20, 30, 3) for _ in range(4)], [0.25] * 4).adapter.pairs["m"].rank == 12
