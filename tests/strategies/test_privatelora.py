"""PrivateLoRA: the mean of cores between shared frozen factors is the mean of the updates, exactly."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.models.parametrizations import CoreMatrix
from fedlora.rounds.codec import read_task, write_task, write_update
from fedlora.strategies import PrivateLoRA
from fedlora.training.client import TrainResult

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
held = st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=5)
LAYERS = {"m": (7, 9), "n": (4, 3)}


def fresh(make, rng, layers=LAYERS, rank=8, scale=2.0, dtype=torch.float64, seed=3):
    adapter = make.adapter(rng, layers, rank, scale, dtype)
    pairs = {m: Pair(p.A, torch.zeros_like(p.B), p.scale) for m, p in adapter.pairs.items()}
    return PrivateLoRA().init(Adapter(pairs, adapter.extra), seed=seed)


def trained(make, rng, task):
    """The task's adapter with other cores and extras."""
    moved = {name: t + 1 for name, t in task.adapter.heads().items()}
    for m, own in task.adapter.own_factors().items():
        moved[f"{m}.core"] = own["core"] + make.tensor(rng, *own["core"].shape).to(own["core"])
    return task.adapter.with_tensors(moved)


def test_the_facts():
    assert (PrivateLoRA.mixed_ranks, PrivateLoRA.linear, PrivateLoRA.exact) == (True, True, True)


@given(seed=seeds, d_out=dims, d_in=dims, held=held)
def test_the_mean_of_cores_is_the_mean_of_updates(make, np64, seed, d_out, d_in, held):
    rng = np.random.default_rng(seed)
    private, state = PrivateLoRA(), fresh(make, rng, {"m": (d_out, d_in)})
    frozen = state.adapter.pairs["m"]
    for _ in range(2):
        peers = [Peer(k, r, {}, {"m": s}) for k, (r, s, _) in enumerate(held)]
        updates = [
            Update(trained(make, rng, private.task(state, peer)), w, peer)
            for peer, (_, _, w) in zip(peers, held, strict=True)
        ]
        state = private.aggregate(state, updates, rng)
        assert np64.close(state.delta("m"), np64.mean(updates, "m"))
    pair = state.adapter.pairs["m"]
    assert torch.equal(pair.A, frozen.A)
    assert torch.equal(pair.B, frozen.B)
    assert pair.scale == 2.0


def test_the_first_step_is_the_base_and_every_entry_of_the_core_has_a_gradient(make, np64, rng):
    state = fresh(make, rng)
    for m, (d_out, d_in) in LAYERS.items():
        pair, core = state.adapter.pairs[m], state.adapter.extra[f"{m}.core"]
        assert not state.delta(m).any()
        assert not core.any()
        G = make.tensor(rng, d_out, d_in)
        M = core.clone().requires_grad_()
        ((pair.scale * pair.B @ M @ pair.A) * G).sum().backward()
        assert np64.close(M.grad, pair.scale * pair.B.T @ G @ pair.A.T)
        assert (M.grad != 0).all()


def test_the_frozen_factors_come_from_the_seed_and_the_module(make, rng):
    one, two, other = (fresh(make, np.random.default_rng(1), seed=seed).adapter.pairs for seed in (3, 3, 4))
    assert torch.equal(one["m"].A, two["m"].A)
    assert torch.equal(one["m"].B, two["m"].B)
    assert not torch.equal(one["m"].A, other["m"].A)
    same = fresh(make, rng, {"a": (6, 6), "b": (6, 6)}).adapter.pairs
    assert not torch.equal(same["a"].A, same["b"].A)
    assert not torch.equal(same["a"].A, same["a"].B)


def test_the_scale_changes_nothing(make, np64, rng):
    # The paper has no alpha: s B is the same whatever s.
    one, two = (fresh(make, np.random.default_rng(1), scale=s).adapter.pairs["m"] for s in (2.0, 0.25))
    assert (one.scale, two.scale) == (2.0, 0.25)
    assert np64.close(2.0 * one.B, 0.25 * two.B)
    assert 0.5 / 3 < one.A.abs().max() <= 1 / 3
    assert 0.5 / 8**0.5 < 2.0 * one.B.abs().max() <= 1 / 8**0.5
    task = (
        PrivateLoRA()
        .task(fresh(make, np.random.default_rng(1)), Peer(0, 8, {}, {"m": 5.0}))
        .adapter.pairs["m"]
    )
    assert np64.close(5.0 * task.B, 2.0 * one.B)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_client_gets_its_block(make, np64, rng, rank):
    private, state = PrivateLoRA(), fresh(make, rng)
    state = private.aggregate(state, [Update(trained(make, rng, private.task(state, Peer(0, 8))))], rng)
    task = private.task(state, Peer(0, rank))
    assert task.trained() == task.shared() == ["head.bias", "head.weight", "m.core", "n.core"]
    assert task.adapter.parametrization == CoreMatrix()
    pair, whole = task.adapter.pairs["m"], state.adapter.pairs["m"]
    assert torch.equal(task.adapter.extra["m.core"], state.adapter.extra["m.core"][:rank, :rank])
    assert torch.equal(pair.A, whole.A[:rank])
    assert torch.equal(pair.B, whole.B[:, :rank])


def test_r_squared_numbers_travel_and_the_frozen_factors_once(make, rng):
    private, state = PrivateLoRA(), fresh(make, rng, dtype=torch.float32)
    first, held = write_task(private.task(state, Peer(0, 5)), 1, 0)
    task, _, _, has = read_task(first)
    assert "adapter/m.A" in first.array_records["arrays"]
    reply = write_update(TrainResult(task.adapter, {}), task, 1, 5).array_records["arrays"]
    assert {n: tuple(a.shape) for n, a in reply.items() if "head" not in n} == {
        "m.core": (5, 5),
        "n.core": (5, 5),
    }
    again = write_task(private.task(state, Peer(0, 5)), 2, 0, held)[0]
    names = {"adapter/m.core", "adapter/n.core", "adapter/head.weight", "adapter/head.bias"}
    assert set(again.array_records["arrays"]) == names
    assert read_task(again, has)[0].adapter.digest() == task.adapter.digest()


@pytest.mark.parametrize("with_base_delta", [False, True])
def test_an_adapter_that_was_there_goes_on_working(make, np64, rng, with_base_delta):
    private, adapter = PrivateLoRA(), make.adapter(rng, LAYERS, 2, 0.7)
    base_delta = {"m": make.pair(rng, 7, 9, 1)} if with_base_delta else None
    state = private.init(adapter, base_delta)
    want = {
        m: np64.delta(p) + (np64.delta(base_delta[m]) if with_base_delta and m == "m" else 0)
        for m, p in adapter.pairs.items()
    }
    assert all(p.scale == 1.0 for p in state.base_delta.values())
    for m in LAYERS:
        assert np64.close(state.delta(m), want[m])
    task = private.task(state, Peer(0, 2))
    assert task.base_delta == state.base_delta
    update = Update(trained(make, rng, task), 1.0, Peer(0, 2))
    new = State.unpack(*private.aggregate(state, [update], rng).pack())
    for m in LAYERS:
        assert np64.close(new.delta(m), want[m] + np64.change(update.adapter, m))


@pytest.mark.parametrize("what", ["A", "B", "rank"])
def test_factors_of_ones_own_are_refused_by_client_and_module(make, rng, what):
    private, state = PrivateLoRA(), fresh(make, rng)
    task = private.task(state, Peer(4, 5))
    pair, extra = task.adapter.pairs["n"], dict(task.adapter.extra)
    wrong = {
        "A": dataclasses.replace(pair, A=pair.A + 1e-9),
        "B": dataclasses.replace(pair, B=pair.B * 1.1),
        "rank": Pair(make.tensor(rng, 9, 3), make.tensor(rng, 4, 9), 2.0),
    }[what]
    if what == "rank":
        extra["n.core"] = make.tensor(rng, 9, 9)
    pairs = {**task.adapter.pairs, "n": wrong}
    sent = dataclasses.replace(task.adapter, pairs=pairs, extra=extra)
    with pytest.raises(IncompatibleUpdates, match=r"client 4 sent other factors for 'n'"):
        private.aggregate(state, [Update(sent, 1.0, Peer(4, 5))], rng)


@pytest.mark.parametrize(
    ("core", "message"), [(None, r"missing \['n.core'\]"), (4, r"shape \(4, 4\) for 'n.core'")]
)
def test_a_core_that_is_missing_or_of_another_rank_than_its_factors_is_refused(make, rng, core, message):
    private, state = PrivateLoRA(), fresh(make, rng)
    sent = private.task(state, Peer(4, 5)).adapter
    extra = {name: t for name, t in sent.extra.items() if name != "n.core"}
    if core is not None:
        extra["n.core"] = make.tensor(rng, core, core)
    with pytest.raises(IncompatibleUpdates, match=message):
        private.aggregate(state, [Update(dataclasses.replace(sent, extra=extra), 1.0, Peer(4, 5))], rng)


def test_weight_zero_and_low_precision(make, np64, rng):
    private, state = PrivateLoRA(), fresh(make, rng, dtype=torch.bfloat16)
    peers = [Peer(0, 8), Peer(1, 3)]
    updates = [
        Update(trained(make, rng, private.task(state, p)), w, p)
        for p, w in zip(peers, (3.0, 0.0), strict=True)
    ]
    for sent in (updates, updates[:1]):
        adapter = private.aggregate(state, sent, rng).adapter
        assert adapter.extra["m.core"].dtype == torch.bfloat16
        mean = np64.mean(updates, "m")
        assert np64.close(np64.change(adapter, "m"), mean, torch.finfo(torch.bfloat16).eps)
