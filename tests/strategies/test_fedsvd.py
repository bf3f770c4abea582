"""FedSVD: the exact mean of B, and an A that the server turns into what has been learned."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.strategies import FedSVD, FFALoRA

held = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9)), min_size=1, max_size=5)


def start(make, rng, rank=4, d_out=6, d_in=9, dtype=torch.float64, scale=2.0):
    return FedSVD().init(Adapter({"m": make.pair(rng, d_out, d_in, rank, scale, dtype)}))


def one_round(make, rng, state, strategy=None, rank=None, step=1.0):
    strategy, rank = strategy or FedSVD(), rank or state.adapter.pairs["m"].rank
    return strategy.aggregate(state, make.round(rng, strategy, state, [Peer(1, rank)], [1.0], step), rng)


def test_the_facts():
    assert (FedSVD.mixed_ranks, FedSVD.linear, FedSVD.exact) == (True, True, True)
    assert FedSVD().period == 1


def test_a_negative_period_is_refused():
    with pytest.raises(ConfigError, match="period"):
        FedSVD(-1)


def test_B_alone_is_trained_and_sent(make, rng):
    task = FedSVD().task(start(make, rng), Peer(1, 3))
    assert task.train == task.share == {"B"}


@given(
    seed=st.integers(0, 2**32 - 1),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    held=held,
    period=st.integers(0, 3),
)
def test_the_mean_is_exact_in_every_round_for_nested_ranks_and_other_scales(
    make, np64, seed, d_out, d_in, held, period
):
    rng, fedsvd = np.random.default_rng(seed), FedSVD(period)
    state = fedsvd.init(Adapter({"m": make.pair(rng, d_out, d_in, 12, 2.0)}))
    peers = [Peer(k, rank, {}, {"m": scale}) for k, (rank, scale) in enumerate(held)]
    for _ in range(4):
        updates = make.round(rng, fedsvd, state, peers, 0.1 + rng.random(len(peers)))
        state = fedsvd.aggregate(state, updates, rng)
        assert np64.close(state.delta("m"), np64.mean(updates, "m"), 1e-11)
        assert (state.adapter.pairs["m"].rank, state.adapter.pairs["m"].scale) == (12, 2.0)


def test_a_mean_of_the_updates_gives_the_same_state(make, np64, rng):
    # Linear: a server that sees nothing but the sum of the padded B's could run it.
    state, peers = start(make, rng), [Peer(1, 4), Peer(2, 2), Peer(3, 3)]
    updates, w = make.round(rng, FedSVD(), state, peers, [1.0, 2.0, 5.0]), [0.125, 0.25, 0.625]
    B = sum(
        x * torch.nn.functional.pad(u.adapter.pairs["m"].B, (0, 4 - u.adapter.pairs["m"].rank))
        for x, u in zip(w, updates, strict=True)
    )
    alone = Update(Adapter({"m": Pair(state.adapter.pairs["m"].A, B, 2.0)}))
    one, two = (FedSVD().aggregate(state, sent, rng).delta("m") for sent in (updates, [alone]))
    assert np64.close(one, two, 1e-13)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (40, 30)])
def test_new_factors_are_the_singular_vectors_and_values(make, np64, rng, shape):
    new = one_round(make, rng, start(make, rng, 4, *shape))
    pair, D = new.adapter.pairs["m"], new.delta("m").numpy()
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    assert np64.orthonormal_rows(pair.A)
    assert np64.close(2.0 * pair.B.norm(dim=0), S[:4], 1e-11)
    for i in range(4):  # up to sign
        assert abs(float(pair.A[i] @ torch.from_numpy(Vh[i]))) == pytest.approx(1, abs=1e-9)
        assert abs(float(pair.B[:, i] @ torch.from_numpy(U[:, i])) * 2 / S[i]) == pytest.approx(1, abs=1e-9)


@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 9), d_in=st.integers(9, 14))
def test_A_never_lengthens_what_goes_through_it(make, seed, rank, d_in):
    rng = np.random.default_rng(seed)
    state = one_round(make, rng, start(make, rng, rank, 5, d_in))
    x = make.tensor(rng, d_in, 50)
    assert ((state.adapter.pairs["m"].A @ x).norm(dim=0) <= x.norm(dim=0) * (1 + 1e-12)).all()


def test_the_rank_does_not_shrink_and_all_directions_learn(make, np64, rng):
    # One direction learned of four, and then only clients of rank 1: the rest is padded, orthonormally.
    state = start(make, rng)
    B = torch.zeros(6, 4, dtype=torch.float64)
    B[:, 1] = 1.0
    new = FedSVD().aggregate(state, [Update(Adapter({"m": Pair(state.adapter.pairs["m"].A, B, 2.0)}))], rng)
    for _ in range(3):
        pair = new.adapter.pairs["m"]
        assert pair.rank == 4
        assert np64.orthonormal_rows(pair.A)
        free = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        ((free @ pair.A) * make.tensor(rng, 6, 9)).sum().backward()
        assert (free.grad.norm(dim=0) > 1e-3).all()
        new = one_round(make, rng, new, rank=1)


def test_a_rank_above_the_sides_keeps_its_rows_of_length_one(make, np64, rng):
    new = one_round(make, rng, start(make, rng, 12, 5, 7))
    assert np64.close(new.adapter.pairs["m"].A.norm(dim=1), np.ones(12), 1e-12)
    assert np64.orthonormal_rows(new.adapter.pairs["m"].A[:7])


def test_nothing_learned_leaves_A_alone(make, rng):
    A = make.tensor(rng, 3, 9)
    state = FedSVD().init(Adapter({"m": Pair(A, torch.zeros(6, 3, dtype=torch.float64), 2.0)}))
    new = one_round(make, rng, state, step=0.0)
    assert torch.equal(new.adapter.pairs["m"].A, A)
    assert not new.adapter.pairs["m"].B.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_period_0_is_FFA_LoRA_bit_for_bit(make, rng, dtype):
    peers = [Peer(1, 4), Peer(2, 2, {}, {"m": 0.3}), Peer(3, 1)]
    ours = theirs = start(make, rng, dtype=dtype)
    for r in range(5):
        one, two = (
            make.round(np.random.default_rng(r), s, now, peers, [1.0, 2.0, 3.0])
            for s, now in ((FedSVD(0), ours), (FFALoRA(), theirs))
        )
        ours, theirs = FedSVD(0).aggregate(ours, one, rng), FFALoRA().aggregate(theirs, two, rng)
        assert ours.digest() == theirs.digest()


def test_new_factors_come_every_period(make, rng):
    state, changed = start(make, rng), []
    for _ in range(7):
        new = one_round(make, rng, state, FedSVD(3))
        changed.append(not torch.equal(new.adapter.pairs["m"].A, state.adapter.pairs["m"].A))
        state = new
    assert changed == [False, False, True, False, False, True, False]


def test_a_round_without_learning_keeps_the_model_at_one_rank(make, np64, rng):
    state = start(make, rng)
    want = state.delta("m")
    for _ in range(5):
        state = one_round(make, rng, state, step=0.0)
    assert np64.close(state.delta("m"), want, 1e-12)


def test_mixed_ranks_shrink_what_few_clients_hold(make, np64, rng):
    state = one_round(make, rng, start(make, rng))
    updates = make.round(
        rng, FedSVD(), state, [Peer(1, 4), Peer(2, 1), Peer(3, 2)], [0.5, 0.3, 0.2], step=0.0
    )
    U, S, Vh = np.linalg.svd(state.delta("m").numpy(), full_matrices=False)
    want = (U[:, :4] * (S[:4] * [1.0, 0.7, 0.5, 0.5])) @ Vh[:4]
    assert np64.close(FedSVD().aggregate(state, updates, rng).delta("m"), want, 1e-11)


def test_a_client_of_a_small_rank_has_the_leading_directions(make, np64, rng):
    state = one_round(make, rng, start(make, rng))
    pair = FedSVD().task(state, Peer(1, 2, {}, {"m": 0.5})).adapter.pairs["m"]
    assert np64.close(np64.delta(pair), np64.best(state.delta("m").numpy(), 2), 1e-11)


def test_the_padding_follows_from_seed_module_and_round(make, rng):
    first = torch.zeros(6, 4, dtype=torch.float64)
    first[:, 0] = 1.0
    pair = make.pair(rng, 6, 9, 4, 2.0)
    update = Update(Adapter({m: Pair(pair.A, first, 2.0) for m in ("m", "n")}))

    def after(seed, round):
        state = State(Adapter({"m": pair, "n": pair}), round, seed=seed)
        return FedSVD().aggregate(state, [update], None).adapter.pairs

    assert torch.equal(after(1, 3)["m"].A, after(1, 3)["m"].A)
    for other in (after(2, 3)["m"], after(1, 4)["m"], after(1, 3)["n"]):
        assert not torch.equal(after(1, 3)["m"].A, other.A)


def test_another_A_is_refused(make, rng):
    state = start(make, rng)
    bad = Update(Adapter({"m": make.pair(rng, 6, 9, 4, 2.0)}), 1.0, Peer(7, 4))
    with pytest.raises(IncompatibleUpdates, match=r"FedSVD: client 7 sent another A for 'm'"):
        FedSVD().aggregate(state, [bad], rng)
