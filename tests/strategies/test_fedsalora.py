"""FedSA-LoRA: A is averaged, row by row over those who hold it; B and the head never leave the client."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.rounds.codec import read_task, write_task, write_update
from fedlora.strategies import FedSALoRA
from fedlora.training.client import TrainRequest, TrainResult

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
held = st.lists(st.tuples(st.integers(1, 8), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=5)
LAYERS = {"m": (7, 9), "n": (4, 3)}


def aggregate(pairs, weights, old):
    updates = [Update(Adapter({"m": pair}), w) for pair, w in zip(pairs, weights, strict=True)]
    return (
        FedSALoRA()
        .aggregate(State(Adapter({"m": old})), updates, np.random.default_rng(0))
        .adapter.pairs["m"]
    )


def test_the_facts():
    assert (FedSALoRA.mixed_ranks, FedSALoRA.linear, FedSALoRA.exact) == (True, False, False)
    assert FedSALoRA.personal


@given(seed=seeds, d_out=dims, d_in=dims, held=held)
def test_a_row_is_the_mean_over_those_who_hold_it_and_scales_are_bs(make, np64, seed, d_out, d_in, held):
    rng = np.random.default_rng(seed)
    pairs, weights = [make.pair(rng, d_out, d_in, r, s) for r, s, _ in held], [w for _, _, w in held]
    old = make.pair(rng, d_out, d_in, 8, 2.0)
    new = aggregate(pairs, weights, old)
    for i in range(8):
        own = [(p.A[i].numpy(), w) for p, w in zip(pairs, weights, strict=True) if p.rank > i]
        want = sum(w * a for a, w in own) / sum(w for _, w in own) if own else old.A[i]
        assert np64.close(new.A[i], want)
    assert torch.equal(new.B, old.B)
    assert (new.rank, new.scale) == (8, 2.0)


@given(seed=seeds, held=held)
def test_with_one_rank_it_is_the_papers_mean(make, np64, seed, held):
    rng = np.random.default_rng(seed)
    pairs, weights = [make.pair(rng, 7, 9, 4, s) for _, s, _ in held], [w for _, _, w in held]
    mean = sum(w * p.A.numpy() for p, w in zip(pairs, weights, strict=True)) / sum(weights)
    assert np64.close(aggregate(pairs, weights, make.pair(rng, 7, 9, 4)).A, mean)


def test_rows_that_nobody_of_weight_holds_stay_bit_for_bit(make, rng):
    old, pairs = make.pair(rng, 7, 9, 8), [make.pair(rng, 7, 9, 2), make.pair(rng, 7, 9, 6)]
    new = aggregate(pairs, [1.0, 0.0], old)
    assert torch.equal(new.A, torch.cat([pairs[0].A, old.A[2:]]))


def test_equal_as_are_the_identity_for_any_ranks(make, np64, rng):
    sa, state = FedSALoRA(), State(make.adapter(rng, LAYERS, 8, 2.0))
    peers = [Peer(0, 2, {"n": 1}), Peer(1, 8), Peer(2, 3, {}, {"m": 0.4})]
    new = sa.aggregate(state, make.round(rng, sa, state, peers, [1.0, 2.0, 3.0], 0.0), rng)
    assert all(np64.close(new.adapter.pairs[m].A, p.A, 1e-14) for m, p in state.adapter.pairs.items())


def test_what_a_client_keeps_does_not_reach_the_state(make, rng):
    sa, state = FedSALoRA(), State(make.adapter(rng, LAYERS, 8, 2.0))
    task = sa.task(state, Peer(0, 8))
    pairs = {m: Pair(p.A + 1, make.tensor(rng, *p.B.shape), p.scale) for m, p in task.adapter.pairs.items()}
    extra = {name: tensor + 5 for name, tensor in task.adapter.extra.items()}
    new = sa.aggregate(state, [Update(Adapter(pairs, extra), 3.0, Peer(0, 8))], rng)
    for m, pair in state.adapter.pairs.items():
        assert torch.equal(new.adapter.pairs[m].B, pair.B)
        assert torch.equal(new.adapter.pairs[m].A, pair.A + 1)
    assert all(torch.equal(new.adapter.extra[name], t) for name, t in state.adapter.extra.items())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_task_trains_all_and_shares_a_in_the_clients_rank_and_scale(make, np64, rng, rank):
    state = State(make.adapter(rng, LAYERS, 8, 2.0))
    task = FedSALoRA().task(state, Peer(0, rank, {}, {"m": 0.5}))
    assert (task.train, task.share) == (frozenset("AB"), frozenset("A"))
    assert task.personal == frozenset(task.adapter.extra)
    assert task.shared() == ["m.A", "n.A"]
    assert task.own() == ["m.B", "n.B", "head.bias", "head.weight"]
    for m, pair in task.adapter.pairs.items():
        old = state.adapter.pairs[m]
        assert torch.equal(pair.A, old.A[:rank])
        assert np64.close(np64.delta(pair), np64.delta(Pair(old.A[:rank], old.B[:, :rank], old.scale)))


def test_only_a_travels_up_and_after_the_first_time_down(make, rng):
    sa, state = FedSALoRA(), State(make.adapter(rng, LAYERS, 8, 2.0, torch.float32))
    first, held = write_task(sa.task(state, Peer(0, 4)), 1, 0)
    task, _, _, has = read_task(first)
    reply = write_update(TrainResult(task.adapter, {}), task, 1, 5)
    assert set(reply.array_records["arrays"]) == {"m.A", "n.A"}
    assert sum(a.numpy().nbytes for a in reply.array_records["arrays"].values()) == 4 * 4 * (9 + 3)
    again, _ = write_task(sa.task(state, Peer(0, 4)), 2, 0, held)
    assert set(again.array_records["arrays"]) == {"adapter/m.A", "adapter/n.A"}
    assert read_task(again, has)[0].adapter.digest() == task.adapter.digest()


def test_a_client_goes_on_from_its_own_b_on_the_new_a(make, rng):
    sa, state = FedSALoRA(), State(make.adapter(rng, LAYERS, 8, 2.0))
    new = dataclasses.replace(state, adapter=make.adapter(rng, LAYERS, 8, 2.0))
    own = {"m.B": make.tensor(rng, 7, 4), "head.bias": torch.tensor(9.0, dtype=torch.float64)}
    start = TrainRequest(0, 5, 0, sa.task(new, Peer(0, 4)), [], own).start
    assert torch.equal(start.pairs["m"].A, new.adapter.pairs["m"].A[:4])
    assert torch.equal(start.pairs["m"].B, own["m.B"])
    assert torch.equal(start.pairs["n"].B, new.adapter.pairs["n"].B[:, :4])  # it has none of its own yet
    assert torch.equal(start.extra["head.bias"], own["head.bias"])


def test_low_precision_costs_its_rounding(make, np64, rng):
    pairs = [make.pair(rng, 7, 9, r, 2.0, torch.bfloat16) for r in (2, 4)]
    new = aggregate(pairs, [1.0, 3.0], make.pair(rng, 7, 9, 4, 2.0, torch.bfloat16))
    assert new.A.dtype == new.B.dtype == torch.bfloat16
    one, two = (p.A.double().numpy() for p in pairs)
    want = two.copy()
    want[:2] = 0.25 * one + 0.75 * two[:2]
    assert np64.close(new.A.double(), want, torch.finfo(torch.bfloat16).eps)
