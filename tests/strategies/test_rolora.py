"""RoLoRA: B in odd rounds, A in even ones, exact in each."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.strategies import FFALoRA, RoLoRA

held = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9)), min_size=1, max_size=5)


def start(make, rng, rank=8, dtype=torch.float64, round=0):
    return State(Adapter({"m": make.pair(rng, 6, 9, rank, 2.0, dtype)}), round)


def test_the_facts():
    assert (RoLoRA.mixed_ranks, RoLoRA.linear, RoLoRA.exact) == (True, True, True)


@pytest.mark.parametrize(("round", "turn"), [(0, "B"), (1, "A"), (2, "B"), (7, "A"), (100, "B")])
def test_the_turn_follows_from_the_rounds_of_the_state(make, rng, round, turn):
    state = start(make, rng, round=round)
    # The same for every client, however often it took part.
    for peer in (Peer(1, 8), Peer(2, 3)):
        task = RoLoRA().task(state, peer)
        assert task.train == task.share == {turn}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_frozen_factor_never_changes_a_bit(make, rng, dtype):
    rolora, state = RoLoRA(), start(make, rng, dtype=dtype)
    peers = [Peer(1, 8), Peer(2, 3, {}, {"m": 0.3}), Peer(3, 5)]
    for done in range(6):
        new = rolora.aggregate(state, make.round(rng, rolora, state, peers, [1.0, 2.0, 3.0]), rng)
        old, now = state.adapter.pairs["m"], new.adapter.pairs["m"]
        assert torch.equal(now.A, old.A) == (done % 2 == 0)
        assert torch.equal(now.B, old.B) == (done % 2 == 1)
        assert (now.scale, now.A.dtype, now.B.dtype) == (2.0, dtype, dtype)
        state = new


@given(
    seed=st.integers(0, 2**32 - 1),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    held=held,
)
def test_the_mean_is_exact_in_every_round_for_nested_ranks_and_other_scales(
    make, np64, seed, d_out, d_in, held
):
    rng, rolora = np.random.default_rng(seed), RoLoRA()
    state = State(Adapter({"m": make.pair(rng, d_out, d_in, 12, 2.0)}))
    peers = [Peer(k, rank, {}, {"m": scale}) for k, (rank, scale) in enumerate(held)]
    for _ in range(4):
        sampled = [p for p in peers if rng.random() < 0.7] or peers
        updates = make.round(rng, rolora, state, sampled, 0.1 + rng.random(len(sampled)))
        state = rolora.aggregate(state, updates, rng)
        assert np64.close(state.delta("m"), np64.mean(updates, "m"), 1e-12)


def test_one_round_is_FFA_LoRA(make, rng):
    state, peers = start(make, rng), [Peer(1, 8), Peer(2, 3, {}, {"m": 0.3})]
    assert RoLoRA().task(state, peers[1]).adapter.digest() == FFALoRA().task(state, peers[1]).adapter.digest()
    updates = make.round(rng, RoLoRA(), state, peers, [1.0, 2.0])
    ours, theirs = (s.aggregate(state, updates, rng) for s in (RoLoRA(), FFALoRA()))
    assert ours.digest() == theirs.digest()


def test_A_has_no_gradient_before_B_has_learned_so_that_B_comes_first(make, rng):
    A = make.tensor(rng, 3, 9).requires_grad_()
    B = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    ((B @ A) * make.tensor(rng, 6, 9)).sum().backward()
    assert not A.grad.any()
    assert B.grad.any()


@pytest.mark.parametrize("round", [0, 1])
def test_another_frozen_factor_is_refused_by_client_and_module(make, rng, round):
    state, frozen = start(make, rng, round=round), "BA"[1 - round]
    good = make.round(rng, RoLoRA(), state, [Peer(3, 8), Peer(7, 2, {}, {"m": 0.5})], [1.0, 1.0])
    RoLoRA().aggregate(state, good, rng)
    pair = good[1].adapter.pairs["m"]
    for A, B in (
        (pair.A, torch.nextafter(pair.B, pair.B + 1)),
        (torch.nextafter(pair.A, pair.A + 1), pair.B),
        (pair.A.flip(0), pair.B.flip(1)),
    ):
        bad = Update(Adapter({"m": Pair(A, B, 0.5)}), 1.0, Peer(7, 2))
        if torch.equal(getattr(bad.adapter.pairs["m"], frozen), getattr(pair, frozen)):
            RoLoRA().aggregate(state, [good[0], bad], rng)  # the factor whose turn it is may be anything
            continue
        with pytest.raises(IncompatibleUpdates, match=rf"RoLoRA: client 7 sent another {frozen} for 'm'"):
            RoLoRA().aggregate(state, [good[0], bad], rng)


def test_a_frozen_B_counts_in_the_scale_of_the_client(make, rng):
    state = start(make, rng, round=1)
    B = state.adapter.pairs["m"].B
    pair = RoLoRA().task(state, Peer(1, 3, {}, {"m": 0.5})).adapter.pairs["m"]
    assert torch.equal(pair.B, B[:, :3] * 4.0)
    bad = Update(Adapter({"m": Pair(pair.A, B[:, :3], 0.5)}), 1.0, Peer(1, 3))
    with pytest.raises(IncompatibleUpdates, match="another B"):
        RoLoRA().aggregate(state, [bad], rng)


@pytest.mark.parametrize("round", [0, 1])
def test_a_round_without_learning_scales_a_direction_by_the_weight_that_holds_it(make, np64, rng, round):
    rolora, state = RoLoRA(), start(make, rng, rank=4, round=round)
    peers = [Peer(1, 4), Peer(2, 1), Peer(3, 2)]
    new = rolora.aggregate(state, make.round(rng, rolora, state, peers, [0.5, 0.3, 0.2], step=0.0), rng)
    kept = torch.tensor([1.0, 0.7, 0.5, 0.5], dtype=torch.float64)
    pair = state.adapter.pairs["m"]
    assert np64.close(new.delta("m"), 2.0 * (pair.B * kept) @ pair.A, 1e-13)
    same = [Peer(k, 4) for k in range(3)]
    new = rolora.aggregate(state, make.round(rng, rolora, state, same, [0.5, 0.3, 0.2], step=0.0), rng)
    assert np64.close(new.delta("m"), state.delta("m"), 1e-14)


def test_no_direction_dies_while_only_clients_of_a_small_rank_are_sampled(make, np64, rng):
    # B = 0 at first; a tail that nobody holds loses one half, never both.
    A = make.tensor(rng, 4, 9)
    state, rolora = State(Adapter({"m": Pair(A, torch.zeros(6, 4, dtype=torch.float64))})), RoLoRA()
    for sampled in ([1], [1], [2], [1], [1], [1], [2], [1], [1]):
        peers = [Peer(rank, rank) for rank in ([2, 4] if sampled == [2] else [2])]
        updates = make.round(rng, rolora, state, peers, [1.0] * len(peers))
        state = rolora.aggregate(state, updates, rng)
        assert np64.close(state.delta("m"), np64.mean(updates, "m"), 1e-12)
        pair = state.adapter.pairs["m"]
        assert ((pair.A.norm(dim=1) > 0) | (pair.B.norm(dim=0) > 0)).all()


def test_it_learns_what_FFA_LoRA_cannot(make, np64, rng):
    # A target outside the rows of A_0: B alone is stuck, B and A in turns are not.
    target, A0 = make.spectrum(rng, 6, 9, [3.0, 2.0]), make.tensor(rng, 2, 9)
    want = target.B @ target.A

    def run(strategy, rounds=40):
        zero = torch.zeros(6, 2, dtype=torch.float64)
        state = strategy.init(Adapter({"m": Pair(A0, zero)}))
        for _ in range(rounds):
            pair = strategy.task(state, Peer(1, 2)).adapter.pairs["m"]
            if "B" in strategy.task(state, Peer(1, 2)).train:
                pair = Pair(pair.A, torch.linalg.lstsq(pair.A.T, want.T).solution.T)
            else:
                pair = Pair(torch.linalg.lstsq(pair.B, want).solution, pair.B)
            state = strategy.aggregate(state, [Update(Adapter({"m": pair}), 1.0, Peer(1, 2))], rng)
        return float((state.delta("m") - want).norm())

    assert run(RoLoRA()) < 1e-8
    assert run(FFALoRA()) > 0.5
