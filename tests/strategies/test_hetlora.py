"""HetLoRA: zero-padded factors weighted by the norm of each update; pruned ranks are remembered."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError
from fedlora.strategies import HetLoRA
from fedlora.training.rules import RankPruning

seeds, dims = st.integers(0, 2**32 - 1), st.integers(1, 9)
held = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 9)), min_size=1, max_size=5)
LAYERS = {"m": (7, 9), "n": (4, 3)}


def updates_of(pairs, weights=None):
    """One update a client, each of one module "m"."""
    weights = weights or [1.0] * len(pairs)
    return [
        Update(Adapter({"m": pair}), w, Peer(k, pair.rank))
        for k, (pair, w) in enumerate(zip(pairs, weights, strict=True))
    ]


def zero(pair, rank, scale):
    return State(
        Adapter(
            {
                "m": Pair(
                    torch.zeros_like(pair.A[:1]).repeat(rank, 1), pair.B[:, :1].repeat(1, rank) * 0, scale
                )
            }
        )
    )


def shares(np64, updates, modules):
    """ω over the given modules, from the dense products."""
    norms = [
        np.sqrt(sum(np.linalg.norm(np64.delta(u.adapter.pairs[m])) ** 2 for m in modules)) for u in updates
    ]
    return np.array(norms) / sum(norms)


def padded_mean(pairs, omega, scale):
    """(Σ ω A_k, Σ ω (s_k/s) B_k) over zero-padded factors."""
    rank = max(pair.rank for pair in pairs)
    A, B = np.zeros((rank, pairs[0].shape[1])), np.zeros((pairs[0].shape[0], rank))
    for pair, w in zip(pairs, omega, strict=True):
        A[: pair.rank] += w * pair.A.numpy()
        B[:, : pair.rank] += w * pair.scale / scale * pair.B.numpy()
    return A, B


def test_the_facts():
    assert (HetLoRA.mixed_ranks, HetLoRA.linear, HetLoRA.exact) == (True, False, False)
    assert HetLoRA() == HetLoRA(0.99, 1e-3, 1, "model", "all")


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": 1.0},
        {"gamma": 0.0},
        {"penalty": -1e-9},
        {"penalty": float("inf")},
        {"least_rank": 0},
        {"weight_scope": "layer"},
        {"mean_over": "some"},
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"HetLoRA.{next(iter(wrong))}: expected .* got"):
        HetLoRA(**wrong)


@given(seed=seeds, d_out=dims, d_in=dims, held=held, scale=st.floats(0.1, 9))
def test_the_published_mean(make, np64, seed, d_out, d_in, held, scale):
    rng = np.random.default_rng(seed)
    pairs = [make.pair(rng, d_out, d_in, r, s) for r, s in held]
    sent = updates_of(pairs, list(rng.uniform(0.1, 9, len(pairs))))  # examples count for nothing
    new = HetLoRA().aggregate(zero(pairs[0], 3, scale), sent, rng).adapter.pairs["m"]
    A, B = padded_mean(pairs, shares(np64, sent, ["m"]), scale)
    assert new.scale == scale
    assert np64.close(new.A, A)
    assert np64.close(new.B, B)


@pytest.mark.parametrize("scope", ["model", "module"])
def test_weights_are_norms_of_the_model_or_of_each_module(make, np64, rng, scope):
    het, state = HetLoRA(weight_scope=scope), State(make.adapter(rng, LAYERS, 5, 2.0))
    sent = [
        Update(make.adapter(rng, LAYERS, r, s), w, Peer(k, r))
        for k, (r, s, w) in enumerate([(1, 3.0, 1.0), (5, 0.5, 7.0), (3, 2.0, 2.0)])
    ]
    new = het.aggregate(state, sent, rng)
    for m in LAYERS:
        A, B = padded_mean(
            [u.adapter.pairs[m] for u in sent], shares(np64, sent, LAYERS if scope == "model" else [m]), 2.0
        )
        assert np64.close(new.adapter.pairs[m].A, A)
        assert np64.close(new.adapter.pairs[m].B, B)
    # The head goes by examples.
    mean = sum(u.weight / 10 * u.adapter.extra["head.weight"] for u in sent)
    assert np64.close(new.adapter.extra["head.weight"], mean)


def test_one_size_for_all_changes_no_weight_and_none_at_all_makes_them_equal(make, np64, rng):
    pairs = [make.pair(rng, 7, 9, r, 2.0) for r in (1, 4, 2)]
    for factor in (0.0, 1e-6, 30.0):
        sized = [Pair(p.A, factor * p.B, p.scale) for p in pairs]
        omega = shares(np64, updates_of(pairs), ["m"]) if factor else [1 / 3] * 3
        new = HetLoRA().aggregate(zero(pairs[0], 4, 2.0), updates_of(sized, [1.0, 8.0, 2.0]), rng)
        A, B = padded_mean(sized, omega, 2.0)
        assert np64.close(new.adapter.pairs["m"].A, A)
        assert np64.close(new.adapter.pairs["m"].B, B)


def test_one_rank_and_one_norm_is_the_plain_mean_of_the_factors(make, np64, rng):
    turn = torch.linalg.qr(make.tensor(rng, 7, 7)).Q
    one = make.pair(rng, 7, 9, 3)
    two = Pair(one.A, turn @ one.B)  # as long, and elsewhere
    new = HetLoRA().aggregate(zero(one, 3, 1.0), updates_of([one, two], [1.0, 9.0]), rng).adapter.pairs["m"]
    assert np64.close(new.A, one.A)
    assert np64.close(new.B, (one.B + two.B) / 2)


@pytest.mark.parametrize("options", [{}, {"weight_scope": "module"}, {"mean_over": "holders"}], ids=str)
def test_who_has_weight_zero_is_not_there_whatever_its_norm(make, np64, rng, options):
    het, state = HetLoRA(**options), State(make.adapter(rng, LAYERS, 5, 2.0))
    sent = [Update(make.adapter(rng, LAYERS, r, 2.0), float(k), Peer(k, 4)) for k, r in enumerate((3, 3, 4))]
    one, two = het.aggregate(state, sent, rng), het.aggregate(state, sent[1:], rng)
    for m in LAYERS:
        assert torch.equal(one.delta(m), two.delta(m))
    assert np64.close(one.adapter.extra["head.weight"], two.adapter.extra["head.weight"])
    assert one.memory.keys() == two.memory.keys() == {"pruned.1"}


def test_without_learning_zero_padding_shrinks_by_p_squared_and_holders_keep_all(make, np64, rng):
    pair = make.spectrum(rng, 9, 8, [5.0, 4.0, 3.0, 2.0, 1.0])
    peers = [Peer(1, 1, {}, {"m": 16.0}), Peer(2, 3, {}, {"m": 16 / 3}), Peer(3, 5, {}, {"m": 16 / 5})]
    start = State(Adapter({"m": Pair(pair.A, pair.B / 2, 2.0)}))
    U, S, Vh = np.linalg.svd(start.delta("m").numpy(), full_matrices=False)
    state, kept = start, start
    for _ in range(3):
        sent = make.round(rng, HetLoRA(), state, peers, [2.0, 3.0, 5.0], step=0.0)
        omega = shares(np64, sent, ["m"])
        S[:5] *= np.array([1.0, *[omega[1] + omega[2]] * 2, omega[2], omega[2]]) ** 2
        state = HetLoRA().aggregate(state, sent, rng)
        assert np64.close(state.delta("m"), (U * S) @ Vh)
        het = HetLoRA(mean_over="holders")
        kept = het.aggregate(kept, make.round(rng, het, kept, peers, [2.0, 3.0, 5.0], step=0.0), rng)
    assert np64.close(kept.delta("m"), start.delta("m"))


@given(seed=seeds, held=held, scale=st.floats(0.1, 9))
def test_holders_alone_decide_a_direction_and_one_without_any_stays(make, np64, seed, held, scale):
    rng = np.random.default_rng(seed)
    pairs = [make.pair(rng, 7, 9, r, s) for r, s in held]
    state, sent = State(Adapter({"m": make.pair(rng, 7, 9, 8, scale)})), updates_of(pairs)
    new = HetLoRA(mean_over="holders").aggregate(state, sent, rng).adapter.pairs["m"]
    omega, old = shares(np64, sent, ["m"]), state.adapter.pairs["m"]
    assert new.rank == max(8, *(p.rank for p in pairs))
    for i in range(new.rank):
        own = [(p, w) for p, w in zip(pairs, omega, strict=True) if p.rank > i]
        total = sum(w for _, w in own)
        A = sum(w / total * p.A[i].numpy() for p, w in own) if own else old.A[i]
        B = sum(w / total * p.scale / scale * p.B[:, i].numpy() for p, w in own) if own else old.B[:, i]
        assert np64.close(new.A[i], A)
        assert np64.close(new.B[:, i], B)


def test_a_client_gets_the_first_directions_and_fresh_ones_where_nobody_was(make, np64, rng):
    state = State(Adapter({"m": make.pair(rng, 7, 9, 8, 2.0)}))
    small = HetLoRA().aggregate(state, make.round(rng, HetLoRA(), state, [Peer(0, 3)], [1.0]), rng)
    task = HetLoRA().task(small, Peer(1, 8, {}, {"m": 0.5})).adapter.pairs["m"]
    assert np64.close(np64.delta(task), small.delta("m"))
    assert np64.close(task.A[:3], small.adapter.pairs["m"].A)  # s / s_j is on B
    assert np64.close(task.B[:, :3], 4.0 * small.adapter.pairs["m"].B)
    assert (task.A[3:].norm(dim=1) > 0.9).all()  # B is zero there, so that A must not be
    assert np64.close(HetLoRA().task(small, Peer(1, 2)).adapter.pairs["m"].A, task.A[:2])


def test_the_rule_of_the_tail_goes_with_the_task(make, rng):
    hetlora = HetLoRA(gamma=0.5, penalty=0.1, least_rank=3)
    tail = hetlora.task(State(make.adapter(rng, LAYERS, 8)), Peer(1, 8)).part(RankPruning)
    assert (tail.gamma, tail.penalty, tail.least) == (0.5, 0.1, 3)
    assert [tail.start(r) for r in (1, 2, 7, 8)] == [0, 1, 3, 4]
    assert [tail.pruned(r) for r in (1, 2, 4, 7, 8)] == [1, 2, 3, 3, 4]
    usual = HetLoRA().task(State(make.adapter(rng, LAYERS, 8)), Peer(1, 8)).part(RankPruning)
    assert all(usual.start(r) == r - 1 for r in range(1, 101))


# --- prunings -----------------------------------------------------------------------------------------------


def ranks(het, state, peer):
    return {m: p.rank for m, p in het.task(state, peer).adapter.pairs.items()}


def reply(het, state, peer, prune, weight=1.0):
    """A client that sends its task back, pruned once or not."""
    task = het.task(state, peer)
    [pruned] = task.part(RankPruning).replies(task.adapter)
    return Update(pruned if prune else task.adapter, weight, peer)


def test_a_pruned_client_is_sent_its_smaller_rank_ever_after_and_never_below_the_least(make, rng):
    het, state = HetLoRA(gamma=0.5, least_rank=3), State(make.adapter(rng, LAYERS, 16, 2.0))
    scales = {"m": 1.5, "n": 0.7}
    one, two = Peer(4, 16, {"n": 5}, scales), Peer(2, 16, {}, scales)
    for m, n in ((8, 3), (4, 3), (3, 3), (3, 3)):
        state = het.aggregate(state, [reply(het, state, one, True), reply(het, state, two, False)], rng)
        assert ranks(het, state, one) == {"m": m, "n": n}
        assert ranks(het, state, two) == {"m": 16, "n": 16}
        # Sampled or not, resumed or not.
        state = het.aggregate(state, [reply(het, state, two, False)], rng)
        state = State.unpack(*state.pack())
        assert ranks(het, state, one) == {"m": m, "n": n}
    assert {name: int(n) for name, n in state.memory.items()} == {"pruned.4": 3}
    assert state.metrics == {"prunings": 3.0}
    assert {p.scale for p in het.task(state, one).adapter.pairs.values()} == {1.5, 0.7}


def test_only_a_whole_pruning_of_a_known_client_is_remembered(make, rng):
    het, state = HetLoRA(gamma=0.5), State(make.adapter(rng, LAYERS, 8, 2.0))
    peer = Peer(4, 8)
    whole = reply(het, state, peer, True)
    half = {**whole.adapter.pairs, "n": het.task(state, peer).adapter.pairs["n"]}
    for update in (
        dataclasses.replace(whole, peer=None),
        dataclasses.replace(whole, adapter=Adapter(half, whole.adapter.extra)),
        reply(het, state, Peer(4, 1), True),  # rank 1 stays rank 1
    ):
        assert het.aggregate(state, [update], rng).memory == {}


def test_a_smaller_client_that_is_of_that_rank_anyway_has_not_pruned(make, rng):
    het, state = HetLoRA(gamma=0.5), State(make.adapter(rng, LAYERS, 8, 2.0))
    assert het.aggregate(state, [reply(het, state, Peer(1, 4), False)], rng).memory == {}


@pytest.mark.parametrize("scope", ["model", "module"])
def test_directions_whose_only_holder_did_not_learn_can_learn_again(make, rng, scope):
    hetlora = HetLoRA(weight_scope=scope)
    still = Pair(make.tensor(rng, 4, 9), torch.zeros(7, 4, dtype=torch.float64), 2.0)
    state = hetlora.aggregate(zero(still, 4, 2.0), updates_of([still, make.pair(rng, 7, 9, 2)]), rng)
    task = hetlora.task(state, Peer(0, 4))
    assert task.adapter.pairs["m"].rank == 4
    assert (task.adapter.pairs["m"].A.norm(dim=1) > 0.1).all()
