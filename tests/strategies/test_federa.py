"""FeDeRA: FedIT's step on a base without its principal part, exported as a delta of twice the rank."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import negative
from fedlora.core.messages import Peer, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.strategies import FeDeRA, FedIT

seeds = st.integers(0, 2**32 - 1)
PEERS = [Peer(3, 4), Peer(1, 4), Peer(2, 4)]
WEIGHTS = [1.0, 3.0, 2.0]


def principal(W, rank, scale):
    """(W's principal pair, minus it): the start by plain numpy."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:rank] / scale)
    pair = Pair(torch.from_numpy(root[:, None] * Vh[:rank]), torch.from_numpy(U[:, :rank] * root), scale)
    return pair, negative(pair)


def begun(rng, d_out=9, d_in=7, rank=4, scale=2.0):
    W = rng.standard_normal((d_out, d_in))
    pair, base_delta = principal(W, rank, scale)
    head = {"head.weight": torch.from_numpy(rng.standard_normal((2, 3)))}
    return W, FeDeRA().init(Adapter({"m": pair}, head), {"m": base_delta}, 5)


def test_the_facts():
    assert (FeDeRA.mixed_ranks, FeDeRA.linear, FeDeRA.exact) == (False, True, False)
    assert FeDeRA.start == "pissa"


@given(seed=seeds, d_out=st.integers(1, 9), d_in=st.integers(1, 9), scale=st.floats(0.1, 9))
def test_the_effective_weight_starts_as_the_pretrained_one(np64, seed, d_out, d_in, scale):
    rng = np.random.default_rng(seed)
    rank = min(d_out, d_in, 3)
    W, state = begun(rng, d_out, d_in, rank, scale)
    assert np64.close(W + state.delta("m").numpy(), W)
    task = FeDeRA().task(state, Peer(0, rank))
    assert np64.close(W + np64.delta(task.base_delta["m"]) + np64.delta(task.adapter.pairs["m"]), W)
    if rank == min(d_out, d_in):
        assert np.linalg.norm(W + np64.delta(task.base_delta["m"])) < 1e-10  # nothing is left in W_f


def test_rounds_average_a_and_b_on_a_base_that_stays(make, np64, rng):
    _, state = begun(rng)
    before = state.base_delta["m"]
    for done in range(3):
        updates = make.round(rng, FeDeRA(), state, PEERS, WEIGHTS, step=0.1)
        state = FeDeRA().aggregate(state, updates, rng)
        shares = np.array(WEIGHTS) / sum(WEIGHTS)
        pairs = [u.adapter.pairs["m"] for u in updates]
        A = sum(w * p.A.numpy() for w, p in zip(shares, pairs, strict=True))
        B = sum(w * p.B.numpy() for w, p in zip(shares, pairs, strict=True))
        assert np64.close(state.delta("m"), 2.0 * B @ A + np64.delta(before))
        assert torch.equal(state.base_delta["m"].A, before.A)
        assert torch.equal(state.base_delta["m"].B, before.B)
        assert state.round == done + 1


def test_what_comes_out_is_a_delta_of_twice_the_rank(make, np64, rng):
    _, state = begun(rng, 20, 30)
    updates = make.round(rng, FeDeRA(), state, PEERS, WEIGHTS, step=0.1)
    new = FeDeRA().aggregate(state, updates, rng)
    whole = new.whole().pairs["m"]
    assert whole.rank == 8
    assert np64.close(np64.delta(whole), new.delta("m"))


def test_without_a_base_delta_it_is_fedit(make, rng):
    adapter = Adapter({"m": make.pair(rng, 6, 5, 4, 0.7)})
    one, two = FeDeRA().init(adapter), FedIT().init(adapter)
    updates = make.round(rng, FedIT(), two, PEERS, WEIGHTS)
    assert FeDeRA().aggregate(one, updates, rng).digest() == FedIT().aggregate(two, updates, rng).digest()


def test_another_rank_has_no_meaning_on_this_base(make, rng):
    _, state = begun(rng)
    updates = [Update(Adapter({"m": make.pair(rng, 9, 7, 2)}, dict(state.adapter.extra)), 1.0, Peer(4, 2))]
    with pytest.raises(IncompatibleUpdates, match="client 4 sent rank 2"):
        FeDeRA().aggregate(state, updates, rng)
