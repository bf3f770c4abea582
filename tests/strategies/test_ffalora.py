"""FFA-LoRA: with one shared A_0, the mean of B is the mean of the updates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.strategies import FFALoRA


def test_the_facts():
    assert (FFALoRA.mixed_ranks, FFALoRA.linear, FFALoRA.exact) == (True, True, True)


def test_B_alone_is_trained_and_sent(make, rng):
    task = FFALoRA().task(State(make.adapter(rng, {"m": (4, 5)}, 3)), Peer(1, 3))
    assert task.train == task.share == {"B"}


@given(
    seed=st.integers(0, 2**32 - 1),
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    held=st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9)), min_size=1, max_size=5),
)
def test_the_mean_is_exact_for_nested_ranks_and_other_scales(make, np64, seed, d_out, d_in, held):
    rng, ffa = np.random.default_rng(seed), FFALoRA()
    state = State(Adapter({"m": make.pair(rng, d_out, d_in, 12, 2.0)}))
    peers = [Peer(k, rank, {}, {"m": scale}) for k, (rank, scale) in enumerate(held)]
    updates = make.round(rng, ffa, state, peers, 0.1 + rng.random(len(peers)))
    new = ffa.aggregate(state, updates, rng)
    assert np64.close(new.delta("m"), np64.mean(updates, "m"), 1e-12)


def test_A0_is_nested_in_every_task_bit_for_bit(make, rng):
    state = State(Adapter({"m": make.pair(rng, 6, 9, 8)}))
    for rank in (1, 3, 8):
        task = FFALoRA().task(state, Peer(1, rank, {}, {"m": 0.3}))
        assert torch.equal(task.adapter.pairs["m"].A, state.adapter.pairs["m"].A[:rank])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_A0_never_changes_a_bit(make, rng, dtype):
    ffa, state = FFALoRA(), State(Adapter({"m": make.pair(rng, 6, 9, 8, 2.0, dtype)}))
    A0 = state.adapter.pairs["m"].A.clone()
    peers = [Peer(1, 8), Peer(2, 3, {}, {"m": 0.3}), Peer(3, 5)]
    for _ in range(10):
        state = ffa.aggregate(state, make.round(rng, ffa, state, peers, [1.0, 2.0, 3.0]), rng)
    assert torch.equal(state.adapter.pairs["m"].A, A0)


@pytest.mark.parametrize("wrong", ["one bit", "other rows", "other seed", "rescaled", "more rows"])
def test_another_A_is_refused_by_client_and_module(make, rng, wrong):
    state = State(Adapter({"m": make.pair(rng, 6, 9, 4)}))
    A, B = state.adapter.pairs["m"].A, make.tensor(rng, 6, 3)
    A = {
        "one bit": torch.nextafter(A[:3], A[:3] + 1),
        "other rows": A[1:4],
        "other seed": make.tensor(rng, 3, 9),
        "rescaled": 2 * A[:3],
        "more rows": torch.cat([A, A[:1]]),
    }[wrong]
    B = make.tensor(rng, 6, len(A))
    good = Update(Adapter({"m": state.adapter.pairs["m"]}), 1.0, Peer(3, 4))
    bad = Update(Adapter({"m": Pair(A, B)}), 1.0, Peer(7, len(A)))
    with pytest.raises(IncompatibleUpdates, match=r"FFALoRA: client 7.*'m'"):
        FFALoRA().aggregate(state, [good, bad], rng)


@pytest.mark.parametrize("s", [0.25, 4.0, 16.0])
def test_scale_and_rate_are_one_choice_under_sgd(make, np64, rng, s):
    # (s, η) walks as (1, s²η): with A frozen, ∂L/∂B = s G Aᵀ and ΔW = s B A.
    d_out, d_in, rank, eta = 5, 7, 4, 2e-3
    A0, W0 = make.tensor(rng, rank, d_in), make.tensor(rng, d_out, d_in)
    data = [(make.tensor(rng, d_in, 20), make.tensor(rng, d_out, 20)) for _ in range(3)]
    peers, weights = [Peer(0, 4), Peer(1, 2), Peer(2, 3)], [1.0, 2.0, 3.0]

    def walk(scale: float, rate: float) -> list[torch.Tensor]:
        ffa, seen = FFALoRA(), []
        state = ffa.init(Adapter({"m": Pair(A0, torch.zeros(d_out, rank, dtype=torch.float64), scale)}))
        for _ in range(6):
            updates = []
            for peer, weight, (X, Y) in zip(peers, weights, data, strict=True):
                task = ffa.task(state, peer)
                pair = task.adapter.pairs["m"]
                B = pair.B.clone().requires_grad_()
                for _ in range(3):
                    loss = ((W0 + pair.scale * B @ pair.A) @ X - Y).square().sum() / 40
                    (grad,) = torch.autograd.grad(loss, B)
                    B = (B - rate * grad).detach().requires_grad_()
                updates.append(Update(Adapter({"m": Pair(pair.A, B.detach(), pair.scale)}), weight, peer))
            state = ffa.aggregate(state, updates, rng)
            seen.append(state.delta("m"))
        return seen

    one, two = walk(s, eta / s**2), walk(1.0, eta)
    assert one[-1].norm() > 1e-2
    for a, b in zip(one, two, strict=True):
        assert np64.close(a, b, 1e-12)


def test_a_round_without_learning_scales_a_column_by_the_weight_that_holds_it(make, np64, rng):
    # Zero padding is the exact mean; that clients of a small rank do not hold the tail is in it.
    ffa, state = FFALoRA(), State(Adapter({"m": make.pair(rng, 6, 9, 4, 2.0)}))
    updates = make.round(rng, ffa, state, [Peer(1, 4), Peer(2, 1), Peer(3, 2)], [0.5, 0.3, 0.2], step=0.0)
    new = ffa.aggregate(state, updates, rng)
    held = torch.tensor([1.0, 0.7, 0.5, 0.5], dtype=torch.float64)
    assert np64.close(new.adapter.pairs["m"].B, state.adapter.pairs["m"].B * held, 1e-14)


def test_nothing_is_learned_through_a_zero_A0(make, rng):
    ffa, state = FFALoRA(), State(Adapter({"m": Pair(torch.zeros(3, 5), torch.zeros(4, 3))}))
    new = ffa.aggregate(state, make.round(rng, ffa, state, [Peer(1, 3)], [1.0]), rng)
    assert not new.delta("m").any()
