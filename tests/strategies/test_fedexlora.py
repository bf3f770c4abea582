"""FedEx-LoRA: FedIT's factors, and what they lose of the mean goes into the base."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate
from fedlora.core.messages import Peer, State, Update
from fedlora.strategies import FedExLoRA, FedIT
from fedlora.strategies.fedexlora import covariance

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
clients = st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=5)


def updates_of(pairs, weights):
    return [
        Update(Adapter({"m": pair}), w, Peer(k, pair.rank))
        for k, (pair, w) in enumerate(zip(pairs, weights, strict=True))
    ]


def test_the_facts():
    assert (FedExLoRA.mixed_ranks, FedExLoRA.linear, FedExLoRA.exact) == (False, False, True)


@given(seed=seeds, d_out=dims, d_in=dims, rank=st.integers(1, 12), clients=clients)
def test_the_effective_weight_is_the_mean_of_the_clients(make, np64, seed, d_out, d_in, rank, clients):
    rng, fedex = np.random.default_rng(seed), FedExLoRA()
    state = fedex.init(Adapter({"m": make.pair(rng, d_out, d_in, rank, 2.0)}))
    peers = [Peer(k, rank, {}, {"m": scale}) for k, (scale, _) in enumerate(clients)]
    for _ in range(3):
        base_delta = np64.delta(state.base_delta["m"]) if state.base_delta else np.zeros((d_out, d_in))
        updates = make.round(rng, fedex, state, peers, [w for _, w in clients])
        state = fedex.aggregate(state, updates, rng)
        assert np64.close(state.delta("m"), base_delta + np64.mean(updates, "m"), 1e-11)


@given(seed=seeds, clients=clients)
def test_the_factors_are_those_of_FedIT(make, seed, clients):
    rng = np.random.default_rng(seed)
    start = State(Adapter({"m": make.pair(rng, 7, 5, 3, 2.0)}))
    updates = updates_of([make.pair(rng, 7, 5, 3, s) for s, _ in clients], [w for _, w in clients])
    ours, theirs = FedExLoRA().aggregate(start, updates, rng), FedIT().aggregate(start, updates, rng)
    assert ours.adapter.digest() == theirs.adapter.digest()


@pytest.mark.parametrize("K", [2, 3, 5])
def test_what_is_added_is_the_centred_covariance_in_K_minus_1_times_r_directions(make, np64, rng, K):
    pairs, w, s = [make.pair(rng, 23, 31, 4, 2.0) for _ in range(K)], rng.dirichlet([1] * K), 2.0
    gain = covariance(pairs, w, s)
    A, B = [p.A.numpy() for p in pairs], [p.B.numpy() for p in pairs]
    A0, B0 = (sum(wk * X for wk, X in zip(w, own, strict=True)) for own in (A, B))
    # As in the paper: factors centred on the mean, the root of the weight on both.
    columns = np.hstack([np.sqrt(wk) * (X - B0) for wk, X in zip(w, B, strict=True)])
    rows = np.vstack([np.sqrt(wk) * (X - A0) for wk, X in zip(w, A, strict=True)])
    assert np64.close(np64.delta(gain), s * columns @ rows, 1e-13)
    assert np.linalg.matrix_rank(columns @ rows) == gain.rank == (K - 1) * 4
    assert gain.scale == 1.0


def test_other_scales_do_not_need_more_directions(make, np64, rng):
    pairs, w = [make.pair(rng, 23, 31, 4, s) for s in (0.5, 2.0, 8.0)], [0.2, 0.3, 0.5]
    start = State(Adapter({"m": make.pair(rng, 23, 31, 4, 3.0)}))
    new = FedExLoRA().aggregate(start, updates_of(pairs, w), rng)
    assert new.base_delta.increment["m"].rank == 8
    assert np64.close(new.delta("m"), np64.sum(pairs, w), 1e-12)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_a_transposed_residual_would_be_seen(make, np64, rng, shape):
    # The authors' code adds the transpose, which a square layer hides.
    pairs, w = [make.pair(rng, *shape, 2, 2.0) for _ in range(3)], [0.2, 0.3, 0.5]
    new = FedExLoRA().aggregate(State(Adapter({"m": pairs[0]})), updates_of(pairs, w), rng)
    added = np64.delta(new.base_delta["m"])
    assert added.shape == shape
    assert np64.close(np64.delta(new.adapter.pairs["m"]) + added, np64.sum(pairs, w), 1e-12)
    if shape == (6, 6):
        assert not np64.close(added, added.T, 1e-2)


def test_a_single_client_loses_nothing_and_adds_nothing(make, np64, rng):
    start, pair = State(Adapter({"m": make.pair(rng, 6, 9, 4, 2.0)})), make.pair(rng, 6, 9, 4, 2.0)
    new = FedExLoRA().aggregate(start, updates_of([pair], [3.0]), rng)
    assert (new.base_delta, new.base_delta.increment) == ({}, {})
    loud = make.pair(rng, 6, 9, 4, 2.0)
    for pairs, weights in (([pair, loud], [3.0, 0.0]), ([loud, pair], [0.0, 3.0])):
        new = FedExLoRA().aggregate(start, updates_of(pairs, weights), rng)
        assert (new.base_delta, new.base_delta.increment) == ({}, {})
        assert np64.close(new.delta("m"), np64.delta(pair), 1e-14)


@pytest.mark.parametrize("same", ["A", "B", "both"])
def test_clients_that_share_a_factor_add_exactly_nothing(make, np64, rng, same):
    one = make.pair(rng, 6, 9, 4, 2.0)
    pairs = [one]
    for _ in range(2):
        other = make.pair(rng, 6, 9, 4, 2.0)
        A = one.A if same in ("A", "both") else other.A
        pairs.append(Pair(A, one.B if same in ("B", "both") else other.B, 2.0))
    w = [0.25, 0.25, 0.5]  # means of equal numbers are those numbers
    new = FedExLoRA().aggregate(State(Adapter({"m": one})), updates_of(pairs, w), rng)
    assert not np64.delta(new.base_delta["m"]).any()
    assert np64.close(new.delta("m"), np64.sum(pairs, w), 1e-13)


@given(seed=seeds)
def test_the_effective_weight_does_not_depend_on_the_gauge(make, np64, seed):
    rng = np.random.default_rng(seed)
    pairs, w = [make.pair(rng, 7, 9, 3, s) for s in (0.5, 2.0, 2.0)], [0.2, 0.3, 0.5]
    turned = []
    for pair in pairs:
        G = make.tensor(rng, 3, 3) + 5 * torch.eye(3, dtype=torch.float64)
        turned.append(Pair(torch.linalg.solve(G, pair.A), pair.B @ G, pair.scale))
    start = State(Adapter({"m": pairs[0]}))
    one, two = (FedExLoRA().aggregate(start, updates_of(p, w), rng).delta("m") for p in (pairs, turned))
    assert np64.close(one, two, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_who_adds_the_gain_to_the_old_base_delta_has_the_new_one_bit_for_bit(make, rng, dtype):
    fedex = FedExLoRA()
    state = fedex.init(Adapter({"m": make.pair(rng, 20, 30, 3, 2.0, dtype)}))
    for sampled in ([1, 2, 3], [2], [1, 3], [1, 2, 3], [1, 2], [1, 2, 3]):
        peers = [Peer(k, 3) for k in sampled]
        new = fedex.aggregate(state, make.round(rng, fedex, state, peers, [1.0] * len(peers), 0.1), rng)
        if len(peers) > 1:
            mine = accumulate(state.base_delta.get("m"), new.base_delta.increment["m"])
            assert torch.equal(mine.A, new.base_delta["m"].A)
            assert torch.equal(mine.B, new.base_delta["m"].B)
        else:
            assert new.base_delta == state.base_delta
        task = fedex.task(new, Peer(9, 3))
        assert task.base_delta is new.base_delta
        assert new.base_delta["m"].A.dtype == dtype
        assert new.base_delta["m"].rank <= 20
        state = new


def test_low_precision_is_rounded_once_at_the_end(make, rng):
    pairs, w = [make.pair(rng, 20, 30, 3, s, torch.bfloat16) for s in (0.5, 2.0, 3.0)], [0.2, 0.3, 0.5]
    wide = [Pair(p.A.double(), p.B.double(), p.scale) for p in pairs]
    found, want = covariance(pairs, w, 2.0), covariance(wide, w, 2.0)
    assert torch.equal(found.A, want.A.bfloat16())
    assert torch.equal(found.B, want.B.bfloat16())


def test_it_begins_with_a_base_delta(make, np64, rng):
    fedex, before, other = FedExLoRA(), make.pair(rng, 6, 9, 2), make.pair(rng, 3, 3, 1)
    state = fedex.init(Adapter({"m": make.pair(rng, 6, 9, 4, 2.0)}), {"m": before, "elsewhere": other})
    updates = make.round(rng, fedex, state, [Peer(1, 4), Peer(2, 4)], [1.0, 2.0])
    new = fedex.aggregate(state, updates, rng)
    assert np64.close(new.delta("m"), np64.delta(before) + np64.mean(updates, "m"), 1e-12)
    assert new.base_delta["elsewhere"] is other


def test_FedIT_on_the_same_updates_is_wrong(make, np64, rng):
    pairs, w = [make.pair(rng, 7, 9, 3, 2.0) for _ in range(3)], [0.2, 0.3, 0.5]
    start, D = State(Adapter({"m": pairs[0]})), np64.sum(pairs, w)
    off = np.linalg.norm(FedIT().aggregate(start, updates_of(pairs, w), rng).delta("m").numpy() - D)
    assert off > 0.3 * np.linalg.norm(D)
