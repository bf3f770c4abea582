"""What a strategy says of itself, and what it asks of clients."""

import dataclasses
import re

import pytest
import torch

import fedlora.clients
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate
from fedlora.core.messages import Peer
from fedlora.errors import ConfigError, FedLoraError, IncompatibleUpdates


def test_it_is_a_frozen_dataclass_that_states_its_facts(strategy):
    assert dataclasses.is_dataclass(strategy)
    assert type(strategy).__dataclass_params__.frozen
    facts = ("mixed_ranks", "linear", "products", "exact", "personal", "fixed_basis")
    assert {type(getattr(strategy, fact)) for fact in facts} == {bool}
    assert strategy == dataclasses.replace(strategy)
    assert strategy.client in ("", *fedlora.clients.__all__)
    assert strategy.start
    assert strategy.server_space in ("", "factors", "product", "rank", "base_delta")


def test_a_task_trains_something_and_shares_no_more_than_it_trains(strategy, state, peers):
    for one in peers:
        task = strategy.task(state, one)
        assert task.share <= task.train <= {"A", "B"}
        names = [name for name, _ in task.adapter.tensors()]
        assert {*task.shared(), *task.own()} <= {*names}
        assert not {*task.shared()} & {*task.own()}
        assert task.shared()
        assert strategy.personal or not task.own()


def test_a_task_has_the_ranks_and_scales_of_its_peer(strategy, np64, state, peers, layers):
    for one in peers:
        task = strategy.task(state, one)
        given = [task.adapter.pairs, np64.working(task).pairs]
        for m, pair in ((m, pair) for pairs in given for m, pair in pairs.items()):
            assert pair.rank == one.ranks.get(m, one.rank)
            assert pair.scale == one.scales.get(m, state.adapter.pairs[m].scale)
            assert pair.shape == layers[m]
        assert all(not pairs or list(pairs) == sorted(layers) for pairs in given)


def test_a_client_of_the_largest_rank_starts_from_the_global_model(strategy, np64, state, layers, largest):
    for one in (Peer(9, largest), Peer(3, largest, {}, dict.fromkeys(layers, 5.0))):
        task = strategy.task(state, one)
        for m, shape in layers.items():
            got = np64.effective(task, np64.working(task), m, shape)
            assert np64.close(got, state.delta(m))
        for name in state.adapter.extra:
            assert torch.equal(np64.working(task).extra[name], state.adapter.extra[name])


def test_the_start_has_the_function_that_it_was_given_and_so_has_a_client(
    strategy, make, np64, rng, layers, largest
):
    adapter = make.adapter(rng, layers, largest, 0.7)
    state = strategy.init(adapter)
    assert state.round == 0
    for m in layers:
        assert np64.close(state.delta(m), np64.delta(adapter.pairs[m]), 1e-12)
    taken = {m: make.pair(rng, *shape, 2) for m, shape in layers.items()}
    try:
        state = strategy.init(adapter, taken, 5)
    except ConfigError:  # says why
        return
    assert state.seed == 5
    for m in layers:
        given = np64.delta(adapter.pairs[m]) + np64.delta(taken[m])
        assert np64.close(state.delta(m), given, 1e-12)
        task = strategy.task(state, Peer(0, largest))
        assert np64.close(np64.effective(task, np64.working(task), m, layers[m]), given)


def test_the_whole_of_a_state_is_one_plain_adapter_of_its_function(strategy, np64, state, layers):
    whole = state.whole()
    assert list(whole.pairs) == sorted(layers)
    for m, pair in whole.pairs.items():
        assert np64.close(np64.delta(pair), state.delta(m), 1e-12)
    assert Adapter({}, whole.extra).digest() == Adapter({}, state.adapter.heads()).digest()


def _bits(pair: Pair) -> str:
    return Adapter({"": pair}).digest()


def test_who_is_up_to_date_needs_only_the_increment(
    strategy, make, rng, state, peers, weights, aggregate, layers
):
    """Bit for bit: else server and clients drift apart without anybody seeing it."""
    for _ in range(3):
        new = aggregate(strategy, state, make.round(rng, strategy, state, peers, weights))
        pairs = [(m, p) for part in (new.base_delta, new.base_delta.increment) for m, p in part.items()]
        assert all(p.scale == 1 and p.shape == layers[m] for m, p in pairs)
        base_deltas = [(state.base_delta, new.base_delta)]
        base_deltas += [
            (strategy.task(state, one).base_delta, strategy.task(new, one).base_delta) for one in peers
        ]
        for old, now in base_deltas:
            if gain := now.increment:
                for m, pair in now.items():
                    want = accumulate(old.get(m), gain[m]) if m in gain else old[m]
                    assert _bits(pair) == _bits(want)
        state = new


def test_a_peer_of_a_larger_rank_than_the_run_knows_gets_it_or_is_refused_by_name(
    strategy, state, outcome, largest
):
    found = outcome(lambda: strategy.task(state, Peer(9, largest + 1)))
    if isinstance(found, IncompatibleUpdates):
        assert re.search(rf"client 9 .*rank {largest + 1} .*'square'", str(found))
    else:
        assert {pair.rank for pair in found.adapter.pairs.values()} <= {largest + 1}


@pytest.mark.parametrize("rank", [-1, 0])
def test_a_peer_without_a_rank_is_refused_by_name(strategy, state, rank):
    with pytest.raises(FedLoraError, match=r"client 9"):
        strategy.task(state, Peer(9, rank))
    with pytest.raises(FedLoraError, match=r"client 9.*'wide'"):
        strategy.task(state, Peer(9, 2, {"wide": rank}))
