import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from fedlora.algebra import pad
from fedlora.errors import FedLoraError, IncompatibleUpdates
from fedlora.protocol import BOTH, Peer, Update
from fedlora.strategy import cut

# --- what it declares ---------------------------------------------------------------------------------------


def test_it_is_a_frozen_dataclass_that_states_its_three_facts(strategy):
    assert dataclasses.is_dataclass(strategy)
    assert type(strategy).__dataclass_params__.frozen
    assert {type(getattr(strategy, fact)) for fact in ("mixed_ranks", "linear", "exact")} == {bool}
    assert strategy == type(strategy)()


def test_a_task_trains_and_shares_some_of_the_two_factors(strategy, state, peers):
    for one in peers:
        task = strategy.task(state, one)
        assert task.train
        assert task.share <= task.train <= BOTH


def test_a_task_has_the_ranks_and_scales_of_its_peer(strategy, state, peers, layers):
    for one in peers:
        pairs = strategy.task(state, one).adapter.pairs
        assert list(pairs) == sorted(layers)
        for m, pair in pairs.items():
            assert pair.rank == one.ranks.get(m, one.rank)
            assert pair.scale == one.scales.get(m, state.adapter.pairs[m].scale)
            assert pair.shape == layers[m]


def test_a_peer_of_a_larger_rank_than_the_run_knows_gets_it_or_is_refused_by_name(
    strategy, state, outcome, largest
):
    found = outcome(lambda: strategy.task(state, Peer(9, largest + 1)))
    if isinstance(found, IncompatibleUpdates):
        assert re.search(rf"client 9 .*rank {largest + 1} .*'square'", str(found))
    else:
        assert {pair.rank for pair in found.adapter.pairs.values()} == {largest + 1}


@pytest.mark.parametrize("rank", [-1, 0])
def test_a_peer_without_a_rank_is_refused_by_name(strategy, state, rank):
    with pytest.raises(FedLoraError, match=r"client 9"):
        strategy.task(state, Peer(9, rank))
    with pytest.raises(FedLoraError, match=r"client 9.*'wide'"):
        strategy.task(state, Peer(9, 2, {"wide": rank}))


# --- what the numbers are -----------------------------------------------------------------------------------


def test_the_order_of_updates_changes_no_bit(strategy, state, updates, aggregate):
    want = aggregate(strategy, state, updates).adapter.digest()
    for order in itertools.permutations(updates):
        assert aggregate(strategy, state, order).adapter.digest() == want


def test_the_unit_of_weights_changes_nothing(
    strategy, np64, state, updates, weights, aggregate, same_model, weighted
):
    base = aggregate(strategy, state, updates)
    doubled = aggregate(strategy, state, weighted(updates, [2 * w for w in weights]))
    assert doubled.adapter.digest() == base.adapter.digest()
    for unit in (1e-6, 0.37, 1e5):
        assert same_model(
            np64, aggregate(strategy, state, weighted(updates, [unit * w for w in weights])), base
        )


@pytest.mark.parametrize("who", range(3))
def test_one_client_with_all_the_weight_is_the_result(
    strategy, np64, state, updates, who, aggregate, weighted, layers
):
    weights = [float(i == who) for i in range(len(updates))]
    for sent in (weighted(updates, weights), [updates[who]]):
        new = aggregate(strategy, state, sent)
        for m in layers:
            assert np64.close(new.delta(m), np64.delta(updates[who].adapter.pairs[m]))
        for name, tensor in updates[who].adapter.extra.items():
            assert np64.close(new.adapter.extra[name], tensor, 1e-14)


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
    strategy, np64, state, updates, aggregate, layers
):
    new = aggregate(strategy, state, updates)
    errors = [np.linalg.norm(new.delta(m).numpy() - np64.mean(updates, m)) for m in layers]
    assert all(error < 1e-10 for error in errors) == strategy.exact


def test_linear_means_the_weighted_mean_of_what_was_sent(
    strategy, np64, state, peers, updates, weights, aggregate
):
    new, share = aggregate(strategy, state, updates), strategy.task(state, peers[0]).share
    power = 1 / len(share)  # a scale is absorbed by what is sent: all of it on one factor, its root on two
    fits = []
    for m, pair in new.adapter.pairs.items():
        for factor in share:
            sent = [u.adapter.pairs[m] for u in updates]
            if max(p.rank for p in sent) > pair.rank:
                fits.append(False)
                continue
            mean = sum(
                w / sum(weights) * (p.scale / pair.scale) ** power * getattr(pad(p, pair.rank), factor)
                for p, w in zip(sent, weights, strict=True)
            )
            found = getattr(pair, factor)
            fits.append(found.shape == mean.shape and np64.close(found, mean, 1e-12))
    assert all(fits) == strategy.linear


def test_extras_are_averaged_with_the_weights(strategy, np64, state, updates, weights, aggregate):
    for name, tensor in aggregate(strategy, state, updates).adapter.extra.items():
        mean = sum(w * u.adapter.extra[name] for w, u in zip(weights, updates, strict=True)) / sum(weights)
        assert np64.close(tensor, mean, 1e-14)


def test_several_rounds_stay_finite_and_count_up(strategy, make, rng, state, peers, weights, aggregate):
    for done in range(1, 6):
        state = aggregate(strategy, state, make.round(rng, strategy, state, peers, weights, step=0.1))
        assert state.round == done
        assert all(tensor.isfinite().all() for _, tensor in state.adapter.tensors())


def test_a_cut_is_the_first_directions_in_the_scale_of_the_peer(make, np64, rng, layers, largest):
    whole = make.adapter(rng, layers, largest, 0.7)
    part = cut(whole, Peer(1, 4, {"wide": 2}, {"tall": 3.0}))
    for m, rank in (("tall", 4), ("square", 4), ("wide", 2)):
        pair = whole.pairs[m]
        assert torch.equal(part.pairs[m].A, pair.A[:rank])
        assert np64.close(np64.delta(part.pairs[m]), 0.7 * (pair.B[:, :rank] @ pair.A[:rank]), 1e-14)
    assert [part.pairs[m].scale for m in ("square", "tall", "wide")] == [0.7, 3.0, 0.7]
