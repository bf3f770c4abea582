"""FLoRA: the stack of all updates is their mean, exactly; it is merged, and LoRA starts anew."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate
from fedlora.core.messages import Peer, State, Update
from fedlora.strategies import FLoRA

dims = st.integers(1, 9)
held = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9)), min_size=1, max_size=5)


def blank(make, rng, layers, rank=12, dtype=torch.float64, scale=2.0):
    """An adapter that has not learned yet."""
    pairs = {}
    for m, shape in layers.items():
        pair = make.pair(rng, *shape, rank, scale, dtype)
        pairs[m] = Pair(pair.A, torch.zeros_like(pair.B), scale)
    return Adapter(pairs)


def test_the_facts():
    assert (FLoRA.mixed_ranks, FLoRA.linear, FLoRA.exact) == (True, False, True)


@given(seed=st.integers(0, 2**32 - 1), d_out=dims, d_in=dims, held=held)
def test_what_is_merged_is_the_mean_for_all_ranks_and_scales(make, np64, seed, d_out, d_in, held):
    rng, flora = np.random.default_rng(seed), FLoRA()
    state = flora.init(blank(make, rng, {"m": (d_out, d_in)}))
    peers = [Peer(k, rank, {}, {"m": scale}) for k, (rank, scale) in enumerate(held)]
    want = np.zeros((d_out, d_in))
    for _ in range(3):
        updates = make.round(rng, flora, state, peers, 0.1 + rng.random(len(peers)))
        state, want = flora.aggregate(state, updates, rng), want + np64.mean(updates, "m")
        assert np64.close(state.delta("m"), want, 1e-12)
        assert np64.close(np64.delta(state.base_delta["m"]), want, 1e-12)
        assert state.base_delta["m"].rank <= min(d_out, d_in)


def test_the_stack_is_no_larger_than_the_ranks_together(make, rng):
    flora = FLoRA()
    state = flora.init(blank(make, rng, {"m": (40, 30)}))
    updates = make.round(rng, flora, state, [Peer(1, 2), Peer(2, 5), Peer(3, 1)], [1.0, 2.0, 3.0])
    new = flora.aggregate(state, updates, rng)
    assert (new.base_delta.increment["m"].rank, new.base_delta.increment["m"].scale) == (8, 1.0)
    assert torch.equal(new.base_delta.increment["m"].A, torch.cat([u.adapter.pairs["m"].A for u in updates]))


def test_one_scale_for_all_would_be_wrong(make, np64, rng):
    # Clients of one alpha have scales alpha / r; a stack with one alpha / r is off by more than half.
    flora, ranks = FLoRA(), (1, 2, 4, 6, 8)
    state = flora.init(blank(make, rng, {"m": (12, 10)}))
    peers = [Peer(k, r, {}, {"m": 16 / r}) for k, r in enumerate(ranks)]
    updates = make.round(rng, flora, state, peers, [1.0] * 5)
    new = flora.aggregate(state, updates, rng)
    pairs = [u.adapter.pairs["m"] for u in updates]
    wrong = np64.sum([Pair(p.A, p.B, 16 * 5 / sum(ranks)) for p in pairs], [0.2] * 5)
    right = np64.sum(pairs, [0.2] * 5)
    assert np.linalg.norm(wrong - right) > 0.5 * np.linalg.norm(right)
    assert np64.close(new.delta("m"), right)


def test_a_single_client_is_merged_as_it_is(make, np64, rng):
    flora = FLoRA()
    state = flora.init(blank(make, rng, {"m": (5, 8)}))
    update = make.round(rng, flora, state, [Peer(1, 3)], [4.0])[0]
    new = flora.aggregate(state, [update], rng)
    assert np64.close(new.delta("m"), np64.delta(update.adapter.pairs["m"]), 1e-14)


def test_lora_starts_anew_every_round(make, rng):
    flora, layers = FLoRA(), {"m": (6, 100), "n": (6, 100)}
    state = flora.init(blank(make, rng, layers), seed=3)
    seen = [state.adapter.pairs["m"].A]
    for done in (1, 2, 3):
        state = flora.aggregate(state, make.round(rng, flora, state, [Peer(1, 12)], [1.0]), rng)
        for m in layers:
            pair = state.adapter.pairs[m]
            assert not pair.B.any()
            assert (pair.rank, pair.scale, pair.shape) == (12, 2.0, (6, 100))
            # Uniform in ±1/√d_in: the variance of a row's entries is 1 / (3 d_in).
            assert 0.95 * 0.1 < pair.A.abs().max() <= 0.1
            assert abs(float(pair.A.norm(dim=1).mean()) - 3**-0.5) < 0.03
        assert not any(torch.equal(state.adapter.pairs["m"].A, A) for A in seen)
        assert not torch.equal(state.adapter.pairs["m"].A, state.adapter.pairs["n"].A)
        seen.append(state.adapter.pairs["m"].A)
        assert (state.round, state.seed) == (done, 3)


def test_fresh_factors_follow_from_seed_and_round_alone(make, rng):
    flora, start = FLoRA(), blank(make, rng, {"m": (6, 9)})

    def after(seed, step):
        state = flora.init(start, seed=seed)
        updates = make.round(rng, flora, state, [Peer(1, 12)], [1.0], step)
        return flora.aggregate(state, updates, rng).adapter.pairs["m"].A

    assert torch.equal(after(1, 1.0), after(1, 2.0))
    assert not torch.equal(after(1, 1.0), after(2, 1.0))


def test_clients_are_nested_in_one_fresh_A(make, rng):
    flora = FLoRA()
    state = flora.init(blank(make, rng, {"m": (6, 9)}))
    state = flora.aggregate(state, make.round(rng, flora, state, [Peer(1, 4)], [1.0]), rng)
    for rank in (1, 3, 12):
        task = flora.task(state, Peer(2, rank, {}, {"m": 0.3}))
        assert torch.equal(task.adapter.pairs["m"].A, state.adapter.pairs["m"].A[:rank])
        assert task.base_delta is state.base_delta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_who_adds_the_gain_to_the_old_base_delta_has_the_new_one_bit_for_bit(make, rng, dtype):
    flora, layers = FLoRA(), {"tall": (40, 20), "wide": (7, 30)}
    state = flora.init(blank(make, rng, layers, dtype=dtype))
    for _ in range(5):  # from stacks to dense sums
        updates = make.round(rng, flora, state, [Peer(1, 4), Peer(2, 1)], [1.0, 2.0])
        new = flora.aggregate(state, updates, rng)
        for m in layers:
            mine = accumulate(state.base_delta.get(m), new.base_delta.increment[m])
            assert torch.equal(mine.A, new.base_delta[m].A)
            assert torch.equal(mine.B, new.base_delta[m].B)
            assert new.base_delta[m].A.dtype == dtype
            assert new.base_delta[m].scale == new.base_delta.increment[m].scale == 1.0
        state = State.unpack(load(save(new.pack()[0])), new.pack()[1])
        assert state.digest() == new.digest()


def test_an_adapter_that_has_learned_is_merged_before_the_first_round(make, np64, rng):
    flora = FLoRA()
    learned, base_delta = make.pair(rng, 6, 9, 4, 2.0), make.pair(rng, 6, 9, 2)
    blank_one = blank(make, rng, {"n": (5, 5)}, rank=4).pairs["n"]
    state = flora.init(Adapter({"m": learned, "n": blank_one}), {"m": base_delta})
    assert np64.close(state.delta("m"), np64.delta(learned) + np64.delta(base_delta), 1e-12)
    assert not state.adapter.pairs["m"].B.any()
    assert not torch.equal(state.adapter.pairs["m"].A, learned.A)
    assert state.adapter.pairs["n"] is blank_one
    assert set(state.base_delta) == {"m"}
    update = make.round(rng, flora, state, [Peer(1, 4)], [1.0])[0]
    new = flora.aggregate(state, [update], rng)
    gained = np64.delta(update.adapter.pairs["m"])
    assert np64.close(new.delta("m") - state.delta("m"), gained, 1e-12)


def test_the_base_delta_of_another_module_stays(make, np64, rng):
    flora, other = FLoRA(), make.pair(rng, 3, 3, 1)
    state = flora.init(blank(make, rng, {"m": (6, 9)}), {"elsewhere": other})
    new = flora.aggregate(state, make.round(rng, flora, state, [Peer(1, 2)], [1.0]), rng)
    assert torch.equal(new.base_delta["elsewhere"].A, other.A)


def test_a_client_of_weight_zero_adds_nothing(make, np64, rng):
    flora = FLoRA()
    state = flora.init(blank(make, rng, {"m": (6, 9)}))
    one, two = make.round(rng, flora, state, [Peer(1, 2), Peer(2, 3)], [1.0, 0.0])
    assert np64.close(flora.aggregate(state, [one, two], rng).delta("m"), np64.delta(one.adapter.pairs["m"]))


def test_small_updates_are_not_lost_in_a_large_sum(make, np64, rng):
    # 40 rounds in float32 beside the base: the sum keeps float32's precision.
    flora, want = FLoRA(), np.zeros((6, 9))
    state = flora.init(blank(make, rng, {"m": (6, 9)}, dtype=torch.float32))
    for _ in range(40):
        updates = make.round(rng, flora, state, [Peer(1, 2), Peer(2, 3)], [1.0, 2.0], step=0.01)
        state, want = flora.aggregate(state, updates, rng), want + np64.mean(updates, "m")
    assert np.linalg.norm(state.delta("m").double().numpy() - want) < 1e-5 * np.linalg.norm(want)


def test_it_works_by_hand_without_peers(make, np64, rng):
    state = FLoRA().init(blank(make, rng, {"m": (6, 9)}))
    pairs = [make.pair(rng, 6, 9, 2, 0.5), make.pair(rng, 6, 9, 4, 3.0)]
    updates = [Update(Adapter({"m": pair}), w) for pair, w in zip(pairs, (1.0, 3.0), strict=True)]
    assert np64.close(FLoRA().aggregate(state, updates, rng).delta("m"), np64.sum(pairs, [0.25, 0.75]))
