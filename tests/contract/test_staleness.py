"""What every strategy does with updates of old versions, for every choice that its fields offer."""

import dataclasses
import itertools

import pytest
import torch

from fedlora.core.changes import Change
from fedlora.errors import IncompatibleUpdates


@pytest.fixture
def changes(strategy, make, rng, states, done, peers, weights):
    """Changes of every peer against the first state, whatever state it is added to, the larger ones first."""
    old = states()[max(0, done - 2)]
    sent = make.round(rng, strategy, old, peers, weights)
    return [
        Change(update, strategy.task(old, update.peer), weight / sum(weights), 0.5)
        for update, weight in zip(sent, weights, strict=True)
    ]


@pytest.fixture(autouse=True)
def takes_old_versions(strategy, state, changes):
    if strategy.staleness == "refused":
        with pytest.raises(IncompatibleUpdates, match=f"{type(strategy).__name__} refuses updates"):
            strategy.apply_changes(state, changes)
        pytest.skip("it refuses updates of an old version")


def test_the_order_of_changes_changes_no_bit(strategy, state, changes):
    want = strategy.apply_changes(state, changes).digest()
    for order in itertools.permutations(changes):
        assert strategy.apply_changes(state, order).digest() == want


def test_who_sends_back_what_it_was_sent_moves_nothing(strategy, state, changes, layers):
    still = [
        dataclasses.replace(one, update=dataclasses.replace(one.update, adapter=one.task.adapter))
        for one in changes
    ]
    after = strategy.apply_changes(state, still)
    assert after.round == state.round + 1
    for m in layers:
        assert torch.equal(after.delta(m), state.delta(m))
    for name, tensor in state.adapter.extra.items():
        assert torch.equal(after.adapter.extra[name], tensor)


def test_beside_one_that_learns_it_only_shares_the_weight(strategy, state, changes, np64, same_model):
    """The change of one client is the same with others that learned nothing as with its own share alone."""
    if type(strategy).__name__ in ("HetLoRA", "RaFLoRA", "FedSALoRA"):
        pytest.skip("it weighs clients against each other")
    alone = strategy.apply_changes(state, changes[:1])
    still = [
        dataclasses.replace(one, update=dataclasses.replace(one.update, adapter=one.task.adapter))
        for one in changes[1:]
    ]
    together = strategy.apply_changes(state, [changes[0], *still])
    assert same_model(np64, together, alone)
