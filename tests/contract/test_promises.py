import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense, of_dense
from fedlora.core.messages import Peer, Update
from fedlora.core.strategy import slice_to_rank
from fedlora.errors import IncompatibleUpdates


def test_the_order_of_updates_changes_no_bit(strategy, state, updates, aggregate):
    want = aggregate(strategy, state, updates).digest()
    for order in itertools.permutations(updates):
        assert aggregate(strategy, state, order).digest() == want


def test_the_unit_of_weights_changes_nothing(
    strategy, np64, state, updates, weights, aggregate, same_model, weighted
):
    base = aggregate(strategy, state, updates)
    doubled = aggregate(strategy, state, weighted(updates, [2 * w for w in weights]))
    assert doubled.digest() == base.digest()
    for unit in (1e-6, 0.37, 1e5):
        assert same_model(
            np64, aggregate(strategy, state, weighted(updates, [unit * w for w in weights])), base
        )


@pytest.mark.parametrize("who", range(3))
def test_one_client_with_all_the_weight_is_the_result(
    strategy, np64, state, peers, updates, who, aggregate, weighted, layers, largest, effective
):
    task = strategy.task(state, peers[who])
    smaller = [p for p in task.adapter.pairs.values() if p.rank < largest]
    if smaller and not strategy.exact:
        pytest.skip("what a smaller client does not hold may stay as it was")
    weights = [float(i == who) for i in range(len(updates))]
    for sent in (weighted(updates, weights), [updates[who]]):
        new = aggregate(strategy, state, sent)
        for m in layers:
            if task.adapter.pairs:
                assert np64.close(new.delta(m), effective(updates[who], m))
        for name in {*task.shared()} & {*new.adapter.heads()}:
            assert np64.close(new.adapter.extra[name], updates[who].adapter.extra[name], 1e-14)


@pytest.mark.parametrize("who", range(3))
def test_a_client_of_weight_zero_has_no_influence(
    strategy, make, np64, rng, state, peers, weights, updates, who, aggregate, same_model, weighted
):
    weights = [w * (i != who) for i, w in enumerate(weights)]
    updates = weighted(updates, weights)
    loud = Update(make.trained(rng, strategy.task(state, peers[who]), step=100.0), 0.0, peers[who])
    without = aggregate(strategy, state, [u for i, u in enumerate(updates) if i != who])
    for silent in (updates[who], loud):
        sent = [silent if i == who else u for i, u in enumerate(updates)]
        assert same_model(np64, aggregate(strategy, state, sent), without)


def test_exact_means_the_weighted_mean_of_effective_updates(
    strategy, make, np64, rng, states, peers, small, weights, aggregate, layers, largest
):
    if strategy.personal:
        assert not strategy.exact
        pytest.skip("the global state is nobody's model")
    errors = []
    runs = [(state, most) for most in (largest, 3) for state in states(most)]
    for state, most in runs:
        updates = make.round(rng, strategy, state, [small(one, most) for one in peers], weights)
        own = [(strategy.task(state, u.peer), u) for u in updates]
        new = aggregate(strategy, state, updates)
        for m, shape in layers.items():
            ideal = sum(u.weight * np64.effective(t, u.adapter, m, shape) for t, u in own) / sum(weights)
            errors.append(np.linalg.norm(new.delta(m).numpy() - ideal) / max(1.0, np.linalg.norm(ideal)))
    assert (max(errors) < 1e-10) == strategy.exact


def test_linear_means_that_the_mean_of_what_was_sent_is_enough(
    strategy, make, np64, rng, states, aggregate, same_model, largest
):
    """The server sees the mean of what clients of one scale sent, padded with zeros, and no metrics.

    With ranks that differ too, where the strategy combines them.
    """
    groups = [(largest,) * 3, *([(largest, 1, 3)] if strategy.mixed_ranks else [])]
    found = []
    for state, ranks in itertools.product(states(), groups):
        peers = [Peer(id, rank) for id, rank in zip((7, 2, 5), ranks, strict=True)]
        sent = make.round(rng, strategy, state, peers, [3.0, 1.0, 2.0])
        sent = [dataclasses.replace(u, metrics={"loss": 1 + i / 4}) for i, u in enumerate(sent)]
        task = strategy.task(state, peers[0])
        given, mean = dict(task.adapter.tensors()), dict[str, torch.Tensor]()
        for name in task.shared():
            mean[name] = torch.zeros_like(given[name])
            for u in sent:
                tensor = dict(u.adapter.tensors())[name]
                mean[name][tuple(slice(n) for n in tensor.shape)] += u.weight / 6 * tensor
        one = Update(task.adapter.with_tensors(mean), 1.0, peers[0])
        news = aggregate(strategy, state, sent), aggregate(strategy, state, [one])
        found.append(same_model(np64, *news, 1e-11))
    assert all(found) == strategy.linear


def test_products_means_that_the_mean_of_the_products_is_enough(
    strategy, make, np64, rng, states, aggregate, same_model, largest
):
    """Of clients of one rank, since who holds which direction is no part of a mean."""
    found = []
    for state, ranks in itertools.product(states(), [(largest,) * 3, (2, 2, 2)]):
        if ranks[0] < largest and not strategy.mixed_ranks:
            continue
        peers = [Peer(id, rank) for id, rank in zip((7, 2, 5), ranks, strict=True)]
        sent = make.round(rng, strategy, state, peers, [3.0, 1.0, 2.0])
        w, heads = [0.5, 1 / 6, 1 / 3], [u.adapter.extra for u in sent]
        own = [u.adapter.pairs for u in sent]
        mean = {m: sum(x * dense(p[m]) for x, p in zip(w, own, strict=True)) for m in own[0]}
        extra = {n: sum(x * head[n] for x, head in zip(w, heads, strict=True)) for n in heads[0]}
        one = Adapter({m: of_dense(delta) for m, delta in mean.items()}, extra)
        try:
            news = [aggregate(strategy, state, got) for got in (sent, [Update(one, 1.0, Peer(0, 1))])]
        except IncompatibleUpdates:
            found.append(False)
            continue
        found.append(same_model(np64, *news, 1e-9))
    assert all(found) == strategy.products


def test_a_shared_head_is_averaged_with_the_weights_and_an_own_one_stays(
    strategy, state, peers, np64, updates, weights, aggregate
):
    new, shared = aggregate(strategy, state, updates), strategy.task(state, peers[0]).shared()
    for name, before in state.adapter.heads().items():
        if name in shared:
            mean = sum(w * u.adapter.extra[name] for w, u in zip(weights, updates, strict=True))
            assert np64.close(new.adapter.extra[name], mean / sum(weights), 1e-14)
        else:
            assert torch.equal(new.adapter.extra[name], before)


def test_clients_that_learned_nothing_leave_the_model_as_it_was(
    strategy, np64, state, aggregate, layers, largest
):
    """A fixed point, for clients that hold all ranks in the state's scale."""
    still = [Peer(4, largest), Peer(8, largest)]
    sent = [Update(strategy.task(state, one).adapter, 1.0 + one.id, one) for one in still]
    new = aggregate(strategy, state, sent)
    assert all(np64.close(new.delta(m), state.delta(m)) for m in layers)


SCALES = (0.03, 0.425, 0.7, 1.7, 12.0)


def test_a_round_without_learning_is_the_identity_for_any_mix_of_scales(
    strategy, np64, states, aggregate, layers, largest
):
    rng = np.random.default_rng(31)
    for state in states():
        still = [Peer(i, largest, {}, {m: float(rng.choice(SCALES)) for m in layers}) for i in range(4)]
        sent = [Update(strategy.task(state, one).adapter, 1.0 + one.id, one) for one in still]
        new = aggregate(strategy, state, sent)
        assert all(np64.close(new.delta(m), state.delta(m)) for m in layers)


@pytest.mark.parametrize("c", [0.25, 4.0])
def test_the_scale_in_which_a_client_states_its_update_changes_nothing(
    strategy, np64, state, updates, c, aggregate, same_model, with_pair
):
    """(A, B / c) with c · s is the same update; by powers of two, so that a frozen B is the same bits."""
    other = updates[1]
    for m, pair in other.adapter.pairs.items():
        other = with_pair(other, m, dataclasses.replace(pair, B=pair.B / c, scale=c * pair.scale))
    want = aggregate(strategy, state, updates)
    assert same_model(np64, aggregate(strategy, state, [updates[0], other, *updates[2:]]), want)


def test_the_first_cut_of_a_given_adapter_is_the_best_of_its_rank(strategy, make, np64, rng, layers, largest):
    """Eckart–Young; who also sends the rest as a base delta starts nearer still. The global update stays."""
    given = make.adapter(rng, layers, largest, 0.7)
    given = Adapter(
        {m: dataclasses.replace(p, B=p.B.flip(1) * 9) for m, p in given.pairs.items()}, given.extra
    )
    state = strategy.init(given)
    assert all(np64.close(state.delta(m), np64.delta(pair)) for m, pair in given.pairs.items())
    for rank in (1, 2, 5, largest) if strategy.mixed_ranks else (largest,):
        task = strategy.task(state, Peer(1, rank, {}, {"tall": 3.0}))
        for m, shape in layers.items():
            if task.adapter.pairs:
                found, D = np64.effective(task, task.adapter, m, shape), np64.delta(given.pairs[m])
                least = np.linalg.norm(D - np64.best(D, rank))
                assert np.linalg.norm(found - D) <= least + 1e-10 * np.linalg.norm(D)


def test_several_rounds_from_nothing_learned_stay_finite_and_count_up(
    strategy, make, rng, peers, weights, aggregate, layers, largest
):
    fresh = make.adapter(rng, layers, largest, 0.7)
    fresh = Adapter({m: Pair(p.A, 0 * p.B, p.scale) for m, p in fresh.pairs.items()}, fresh.extra)
    state = strategy.init(fresh)
    assert not any(state.delta(m).any() for m in layers)
    for done in range(1, 6):
        state = aggregate(strategy, state, make.round(rng, strategy, state, peers, weights, step=0.1))
        assert state.round == done
        named = [*state.adapter.tensors(), *((m, p.B) for m, p in state.base_delta.items())]
        assert all(tensor.isfinite().all() for _, tensor in named)
        assert all(math.isfinite(value) for value in state.metrics.values())


def test_a_cut_is_the_first_directions_in_the_scale_of_the_peer(make, np64, rng, layers, largest):
    whole = make.adapter(rng, layers, largest, 0.7)
    part = slice_to_rank(whole, Peer(1, 4, {"wide": 2}, {"tall": 3.0}))
    for m, rank in (("tall", 4), ("square", 4), ("wide", 2)):
        pair = whole.pairs[m]
        assert torch.equal(part.pairs[m].A, pair.A[:rank])
        assert np64.close(np64.delta(part.pairs[m]), 0.7 * (pair.B[:, :rank] @ pair.A[:rank]), 1e-14)
    assert [part.pairs[m].scale for m in ("square", "tall", "wide")] == [0.7, 3.0, 0.7]
