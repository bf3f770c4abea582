"""FedRot-LoRA: factors are rotated towards the reference, products are not, and the mean errs less."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError
from fedlora.strategies import FedIT, FedRotLoRA
from fedlora.strategies.fedrotlora import aligned, rotation

seeds, sides = st.integers(0, 2**32 - 1), st.sampled_from("AB")
blends = st.one_of(st.just(1.0), st.floats(0.01, 1.0))


def turn(make, rng, rank):
    """A random rotation."""
    Q = torch.linalg.qr(make.tensor(rng, rank, rank)).Q
    return Q if torch.linalg.det(Q) > 0 else torch.cat([-Q[:, :1], Q[:, 1:]], 1)


def updates_of(pairs, weights):
    return [
        Update(Adapter({"m": pair}), w, Peer(k, pair.rank))
        for k, (pair, w) in enumerate(zip(pairs, weights, strict=True))
    ]


def test_the_facts():
    assert (FedRotLoRA.mixed_ranks, FedRotLoRA.linear, FedRotLoRA.exact) == (False, False, False)
    assert FedRotLoRA().blend == 1.0


@pytest.mark.parametrize("blend", [-0.1, 1.5, float("nan")])
def test_a_blend_outside_its_range_is_refused(blend):
    with pytest.raises(ConfigError, match="blend"):
        FedRotLoRA(blend)


@given(seed=seeds, rank=st.integers(1, 9))
def test_the_rotation_is_the_nearest_one(make, np64, seed, rank):
    rng = np.random.default_rng(seed)
    M = make.tensor(rng, rank, rank)
    R = rotation(M)
    assert np64.close(R.T @ R, np.eye(rank), 1e-12)
    assert float(torch.linalg.det(R)) == pytest.approx(1, abs=1e-10)
    for _ in range(50):  # no other rotation does better
        assert float((R * M).sum()) >= float((turn(make, rng, rank) * M).sum()) - 1e-9


@given(
    seed=seeds,
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rank=st.integers(1, 12),
    side=sides,
    blend=blends,
)
def test_a_product_is_left_as_it_was_and_its_factors_come_nearer(
    make, np64, seed, d_out, d_in, rank, side, blend
):
    rng = np.random.default_rng(seed)
    pair, reference = make.pair(rng, d_out, d_in, rank, 2.0), make.pair(rng, d_out, d_in, rank, 2.0)
    found = aligned(pair, reference, side, blend)
    assert np64.close(np64.delta(found), np64.delta(pair), 1e-12)
    assert found.scale == 2.0

    def apart(one):
        return float((getattr(one, side) - getattr(reference, side)).norm())

    if blend == 1:
        assert apart(found) <= apart(pair) + 1e-9
        assert apart(aligned(pair, reference, side)) <= apart(aligned(pair, reference, side, 0.5)) + 1e-9


@given(seed=seeds, rank=st.integers(1, 6), side=sides)
def test_a_rotated_reference_is_turned_back(make, np64, seed, rank, side):
    rng = np.random.default_rng(seed)
    reference, Q = make.pair(rng, 7, 9, rank, 2.0), turn(make, rng, rank)
    back = aligned(Pair(Q.T @ reference.A, reference.B @ Q, 2.0), reference, side)
    assert np64.close(back.A, reference.A, 1e-9)
    assert np64.close(back.B, reference.B, 1e-9)


@pytest.mark.parametrize("round", [0, 1])
def test_clients_that_are_turns_of_one_update_are_averaged_exactly(make, np64, rng, round):
    reference = make.pair(rng, 7, 9, 3, 2.0)
    other = make.tensor(rng, 7, 3), make.tensor(rng, 3, 9)
    A, B = (reference.A, other[0]) if round == 0 else (other[1], reference.B)
    turns = [turn(make, rng, 3) for _ in range(4)]
    pairs, w = [Pair(Q.T @ A, B @ Q, 2.0) for Q in turns], [0.1, 0.2, 0.3, 0.4]
    state, want = State(Adapter({"m": reference}), round), 2.0 * B @ A
    assert np64.close(FedRotLoRA().aggregate(state, updates_of(pairs, w), rng).delta("m"), want, 1e-9)
    off = (FedIT().aggregate(state, updates_of(pairs, w), rng).delta("m") - want).norm()
    assert off > 0.3 * want.norm()


def test_it_errs_less_than_FedIT_where_clients_have_turned_apart(make, np64, rng):
    reference = make.pair(rng, 12, 15, 4, 2.0)
    for round in range(4):
        pairs = []
        for _ in range(5):
            Q = turn(make, rng, 4)
            near = Pair(
                reference.A + 0.3 * make.tensor(rng, 4, 15), reference.B + 0.3 * make.tensor(rng, 12, 4)
            )
            pairs.append(Pair(Q.T @ near.A, near.B @ Q, 2.0))
        state, D = State(Adapter({"m": reference}), round), np64.sum(pairs, [0.2] * 5)
        ours, soft, theirs = (
            np.linalg.norm(s.aggregate(state, updates_of(pairs, [1.0] * 5), rng).delta("m").numpy() - D)
            for s in (FedRotLoRA(), FedRotLoRA(0.7), FedIT())
        )
        assert ours < soft < theirs
        assert ours < 0.2 * theirs


@pytest.mark.parametrize("round", [0, 1, 2, 3])
def test_odd_rounds_align_A_and_even_ones_B(make, rng, round):
    reference, pair = make.pair(rng, 7, 9, 3, 2.0), make.pair(rng, 7, 9, 3, 2.0)
    found = FedRotLoRA().aggregate(State(Adapter({"m": reference}), round), updates_of([pair], [1.0]), rng)
    want = aligned(pair, reference, "BA"[(round + 1) % 2])
    assert torch.equal(found.adapter.pairs["m"].A, want.A)
    assert torch.equal(found.adapter.pairs["m"].B, want.B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("why", ["blend 0", "no reference"])
def test_where_nothing_is_rotated_it_is_FedIT_bit_for_bit(make, rng, dtype, why):
    first = make.pair(rng, 7, 9, 3, 2.0, dtype)
    if why == "no reference":
        first = Pair(first.A, torch.zeros_like(first.B), 2.0)
    state = State(Adapter({"m": first, "n": first}))
    strategy = FedRotLoRA(0.0 if why == "blend 0" else 1.0)
    peers = [Peer(1, 3), Peer(2, 3, {}, {"m": 0.5}), Peer(3, 3)]
    updates = make.round(rng, FedIT(), state, peers, [1.0, 2.0, 3.0])
    ours, theirs = (s.aggregate(state, updates, rng) for s in (strategy, FedIT()))
    assert ours.digest() == theirs.digest()


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("learned", [0.0, 0.1])
def test_the_scale_of_a_client_turns_nothing(make, np64, rng, round, learned):
    # Clients of other scales that took the same step are turned alike, so that their mean is exact.
    reference = make.pair(rng, 7, 9, 3, 2.0)
    A = reference.A + learned * make.tensor(rng, 3, 9)
    B = reference.B + learned * make.tensor(rng, 7, 3)
    pairs = [Pair(A, B * (2.0 / s), s) for s in (0.5, 2.0, 8.0)]
    state = State(Adapter({"m": reference}), round)
    new = FedRotLoRA().aggregate(state, updates_of(pairs, [0.2, 0.3, 0.5]), rng)
    assert np64.close(new.delta("m"), 2.0 * B @ A, 1e-12)
    assert new.adapter.pairs["m"].scale == 2.0
    if not learned:
        assert np64.close(new.adapter.pairs["m"].A, reference.A, 1e-10)


@pytest.mark.parametrize("side", ["A", "B"])
def test_what_a_reference_says_nothing_of_is_not_turned(make, np64, rng, side):
    # More directions than the layer has sides, and a client that sends zeros.
    reference, pair = make.pair(rng, 2, 2, 6, 2.0), make.pair(rng, 2, 2, 6, 2.0)
    same = aligned(reference, reference, side)
    assert np64.close(same.A, reference.A, 1e-10)
    assert np64.close(same.B, reference.B, 1e-10)
    zero = Pair(torch.zeros_like(pair.A), torch.zeros_like(pair.B), 2.0)
    assert not np64.delta(aligned(zero, reference, side)).any()
    assert np64.close(rotation(torch.zeros(4, 4, dtype=torch.float64)), np.eye(4), 1e-12)


@given(seed=seeds, blend=st.floats(0.01, 0.99))
def test_a_soft_rotation_is_the_one_nearest_to_the_blend(make, np64, seed, blend):
    # In the plane: (1 - λ) I + λ R(θ) is a rotation times a number.
    rng = np.random.default_rng(seed)
    reference, Q = make.pair(rng, 7, 9, 2, 1.0), turn(make, rng, 2)
    soft = aligned(Pair(Q.T @ reference.A, reference.B @ Q), reference, "A", blend)
    cos, sin = float(Q[0, 0]), float(Q[0, 1])  # the whole rotation is Qᵀ
    column = np.array([1 - blend + blend * cos, blend * sin])
    if np.linalg.norm(column) < 1e-3:
        return  # halfway between opposite turns there is no nearest one
    (c, s), want = column / np.linalg.norm(column), Q.T @ reference.A
    assert np64.close(soft.A, np.array([[c, s], [-s, c]]) @ want.numpy(), 1e-9)
