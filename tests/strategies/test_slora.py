"""SLoRA: the mean of sparse updates under one mask, its best factors, then FedIT or FlexLoRA."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.models.parametrizations import Sparse
from fedlora.models.parametrizations.sparse import places
from fedlora.strategies import FedIT, FlexLoRA, SLoRA

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
PEERS = [Peer(7, 3), Peer(2, 3), Peer(5, 3)]
MIXED = [Peer(7, 3), Peer(2, 1, {}, dict.fromkeys(LAYERS, 4.0)), Peer(5, 2)]
WEIGHTS = [3.0, 1.0, 2.0]
seeds = st.integers(0, 2**32 - 1)


def fresh(make, rng, rank=3, scale=0.7):
    """LoRA's own start: B = 0."""
    adapter = make.adapter(rng, LAYERS, rank, scale)
    pairs = {m: Pair(p.A, torch.zeros_like(p.B), p.scale) for m, p in adapter.pairs.items()}
    return Adapter(pairs, adapter.extra)


def step(make, rng, slora, state, peers=PEERS, size=1.0):
    updates = make.round(rng, slora, state, peers, WEIGHTS[: len(peers)], step=size)
    return slora.aggregate(state, updates, rng), updates


def scattered(state, values, m):
    """M ⊙ V by plain numpy."""
    matrix = np.zeros(LAYERS[m])
    matrix.reshape(-1)[places(state.seed, m, LAYERS[m], len(values)).numpy()] = values.numpy()
    return matrix


def mean(updates, name):
    total = sum(u.weight for u in updates)
    return sum(u.weight / total * u.adapter.extra[name] for u in updates)


# --- the first stage ----------------------------------------------------------------------------------------


def test_a_task_is_the_values_and_the_head_under_one_mask(make, rng):
    state = SLoRA().init(fresh(make, rng), seed=11)
    for peer in PEERS:
        task = SLoRA().task(state, peer)
        assert (task.adapter.pairs, task.train, task.share) == ({}, frozenset(), frozenset())
        assert task.adapter.parametrization == Sparse(11)
        assert set(task.shared()) == {*state.adapter.extra, *(f"{m}.sparse" for m in LAYERS)}
        assert not any(task.adapter.extra[f"{m}.sparse"].any() for m in LAYERS)


def test_a_round_costs_by_default_what_one_of_lora_does(make, rng):
    state = SLoRA().init(fresh(make, rng, rank=2))
    for m, (d_out, d_in) in LAYERS.items():
        assert len(state.memory[f"{m}.sparse"]) == min(2 * (d_out + d_in), d_out * d_in)
    for density in (0.01, 0.3, 1.0):
        state = SLoRA(density=density).init(fresh(make, rng))
        for m, (d_out, d_in) in LAYERS.items():
            assert len(state.memory[f"{m}.sparse"]) == max(1, round(density * d_out * d_in))


def test_the_server_takes_the_weighted_mean_and_nothing_moves_off_the_mask(make, np64, rng):
    slora = SLoRA(sparse_rounds=4, density=0.3)
    state = slora.init(fresh(make, rng), seed=3)
    for _ in range(3):
        state, updates = step(make, rng, slora, state)
        for m, shape in LAYERS.items():
            values = mean(updates, f"{m}.sparse")
            assert np64.close(state.delta(m), scattered(state, values, m))
            on = np.zeros(shape, dtype=bool)
            on.reshape(-1)[places(3, m, shape, len(values)).numpy()] = True
            assert (state.delta(m).numpy()[~on] == 0).all()
            assert (state.delta(m).numpy()[on] != 0).all()
            assert torch.equal(
                slora.task(state, PEERS[0]).adapter.extra[f"{m}.sparse"], state.memory[f"{m}.sparse"]
            )
        assert np64.close(state.adapter.extra["head.weight"], mean(updates, "head.weight"))


@pytest.mark.slow
def test_the_mask_is_the_same_in_another_process_and_another_for_another_seed():
    home = places.__module__
    code = f"from {home} import places; print(places(5, 'wide', (5, 9), 12).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = places(5, "wide", (5, 9), 12)
    assert printed.strip() == str(found.tolist())
    assert len(set(found.tolist())) == 12
    assert not torch.equal(found, places(6, "wide", (5, 9), 12))
    assert not torch.equal(found, places(5, "tall", (5, 9), 12))


def test_an_adapter_that_has_learned_stays_fixed_below_the_values_and_counts(make, np64, rng):
    slora = SLoRA(keep_residual=True)
    adapter = make.adapter(rng, LAYERS, 3, 0.7)
    state = slora.init(adapter, seed=3)
    for done in range(2):
        task = slora.task(state, PEERS[0])
        assert all(np64.close(np64.delta(task.base_delta[m]), np64.delta(adapter.pairs[m])) for m in LAYERS)
        assert {pair.scale for pair in task.base_delta.values()} == {1.0}
        state, updates = step(make, rng, slora, state)
        for m in LAYERS:
            want = np64.delta(adapter.pairs[m]) + scattered(state, mean(updates, f"{m}.sparse"), m)
            assert np64.close(state.delta(m), want), done


# --- the hand-over ------------------------------------------------------------------------------------------


@given(seed=seeds, rank=st.integers(1, 12), scale=st.floats(0.1, 9))
def test_the_factors_are_the_best_of_their_rank_and_the_rest_is_dropped(make, np64, seed, rank, scale):
    rng = np.random.default_rng(seed)
    slora = SLoRA(sparse_rounds=1, density=0.4)
    state, updates = step(make, rng, slora, slora.init(fresh(make, rng, rank, scale)), [Peer(1, rank)])
    kept = whole = 0.0
    for m in LAYERS:
        delta = scattered(state, mean(updates, f"{m}.sparse"), m)
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert np64.close(state.delta(m), np64.best(delta, rank))
        lost = np.linalg.norm(delta - state.delta(m).numpy()) ** 2
        assert lost == pytest.approx((sigma[rank:] ** 2).sum(), abs=1e-9)
        assert (state.adapter.pairs[m].rank, state.adapter.pairs[m].scale) == (rank, scale)
        kept, whole = kept + (sigma[:rank] ** 2).sum(), whole + (sigma**2).sum()
    assert state.metrics == {"energy_kept": pytest.approx(kept / whole, abs=1e-9)}
    assert not state.base_delta
    assert not state.memory


@given(seed=seeds, rank=st.integers(1, 12))
def test_a_kept_residual_leaves_the_function_unchanged(make, np64, seed, rank):
    rng = np.random.default_rng(seed)
    slora = SLoRA(sparse_rounds=1, keep_residual=True)
    state, updates = step(make, rng, slora, slora.init(fresh(make, rng, rank)), [Peer(1, rank)])
    task = slora.task(state, Peer(1, rank))
    for m in LAYERS:
        delta = scattered(state, mean(updates, f"{m}.sparse"), m)
        assert np64.close(state.delta(m), delta)
        assert np64.close(np64.delta(task.adapter.pairs[m]), np64.best(delta, rank))
        assert np64.close(np64.delta(task.base_delta[m]), delta - np64.best(delta, rank))
        assert task.base_delta[m].scale == 1.0


def test_every_direction_can_learn_after_a_hand_over_of_little_or_nothing(make, rng):
    slora = SLoRA(sparse_rounds=1, density=0.01)  # one value a layer
    state, _ = step(make, rng, slora, slora.init(fresh(make, rng)))
    for pair in state.adapter.pairs.values():
        assert (pair.A.norm(dim=1) > 1e-3).all()
        assert pair.B.norm() > 0
    state, _ = step(make, rng, slora, slora.init(fresh(make, rng)), size=0.0)
    assert state.metrics == {"energy_kept": 1.0}
    assert all((pair.A.norm(dim=1) > 1e-3).all() for pair in state.adapter.pairs.values())


# --- the second stage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "plain", "peers"), [("fedit", FedIT(), PEERS), ("flexlora", FlexLoRA(), MIXED)]
)
@pytest.mark.parametrize("sparse", [0, 1])
def test_it_is_fedit_or_flexlora_from_there(make, rng, second, plain, peers, sparse):
    slora = SLoRA(sparse_rounds=sparse, second=second)
    state = slora.init(fresh(make, rng), seed=4)
    if sparse:
        state, _ = step(make, rng, slora, state, peers)
    theirs = State(state.adapter, state.round, seed=4)
    for done in range(3):
        for peer in peers:
            ours, want = slora.task(state, peer), plain.task(theirs, peer)
            assert ours.adapter.digest() == want.adapter.digest()
            assert replace(ours, adapter=want.adapter) == want
        updates = make.round(np.random.default_rng(done), plain, theirs, peers, WEIGHTS)
        state, theirs = slora.aggregate(state, updates, rng), plain.aggregate(theirs, updates, rng)
        assert state.digest() == theirs.digest()


def test_the_facts_follow_the_second_stage():
    def facts(slora):
        return slora.mixed_ranks, slora.linear, slora.exact

    assert facts(SLoRA()) == facts(SLoRA(keep_residual=True)) == (False, True, False)
    assert facts(SLoRA(second="flexlora")) == (True, False, False)
    assert facts(SLoRA(second="flexlora", keep_residual=True)) == (True, False, True)
    assert facts(SLoRA(second="flexlora", sparse_rounds=0)) == (True, False, True)  # FlexLoRA's
    assert facts(SLoRA) == (False, True, False)  # no instance has changed the class


def test_with_flexlora_and_the_residual_every_round_is_exact(make, np64, rng):
    slora = SLoRA(sparse_rounds=2, second="flexlora", keep_residual=True, density=0.3)
    state = slora.init(fresh(make, rng), seed=4)
    for _ in range(5):
        tasks = [slora.task(state, peer) for peer in MIXED]
        state, updates = step(make, rng, slora, state, MIXED)
        for m, shape in LAYERS.items():
            own = [np64.effective(t, u.adapter, m, shape) for t, u in zip(tasks, updates, strict=True)]
            want = sum(w / sum(WEIGHTS) * each for w, each in zip(WEIGHTS, own, strict=True))
            assert np64.close(state.delta(m), want)


# --- refusals -----------------------------------------------------------------------------------------------


def test_what_a_client_sends_in_the_first_stage_is_checked(make, rng):
    slora = SLoRA()
    state = slora.init(fresh(make, rng))
    good = make.round(rng, slora, state, PEERS, WEIGHTS)
    values = good[1].adapter.extra["wide.sparse"]
    for bad in (values[1:], values.repeat(2), values * torch.nan):
        extra = {**good[1].adapter.extra, "wide.sparse": bad}
        with pytest.raises(IncompatibleUpdates, match=r"client 2 sent .*'wide.sparse'"):
            slora.aggregate(state, [good[0], Update(Adapter({}, extra), 1.0, PEERS[1])], rng)
    with pytest.raises(IncompatibleUpdates, match=r"client 2 .*modules.*unknown \['square'"):
        slora.aggregate(state, [Update(state.adapter, 1.0, PEERS[1])], rng)


def test_settings_that_cannot_be_are_refused(make, rng):
    for field, value in (("sparse_rounds", -1), ("density", 0.0), ("density", 1.1), ("second", "fedavg")):
        with pytest.raises(ConfigError, match=rf"strategy\.{field}: expected .*got '?{value}"):
            SLoRA(**{field: value})
    adapter = fresh(make, rng)
    with pytest.raises(ConfigError, match=r"lora\.init=lora, or strategy\.sparse_rounds=0"):
        SLoRA().init(adapter, adapter.pairs)
    assert SLoRA(sparse_rounds=0).init(adapter, adapter.pairs).base_delta == adapter.pairs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_precision_of_the_adapter_is_kept_through_both_stages(make, rng, dtype):
    slora = SLoRA(sparse_rounds=1, keep_residual=True)
    state = slora.init(make.adapter(rng, LAYERS, 3, 0.7, dtype))
    for _ in range(2):
        state, _ = step(make, rng, slora, state)
        kinds = {
            t.dtype for adapter in (state.adapter, Adapter(state.base_delta)) for _, t in adapter.tensors()
        }
        assert kinds == {dtype}


def test_without_a_sparse_stage_ranks_begin_with_the_best_cuts_of_a_given_adapter(make, np64, rng):
    given, strategy = Adapter({"m": make.pair(rng, 7, 9, 6, 2.0)}), SLoRA(sparse_rounds=0, second="flexlora")
    state = strategy.init(given)
    for rank in (1, 3, 6):
        pair = strategy.task(state, Peer(0, rank)).adapter.pairs["m"]
        assert np64.close(np64.delta(pair), np64.best(np64.delta(given.pairs["m"]), rank))
