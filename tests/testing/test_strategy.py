"""The public check of a strategy passes ours, and names what is wrong with a broken one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

import fedlora as fl
from fedlora.core.strategy import mean_adapter
from fedlora.testing import check_strategy
from fedlora.testing.strategy import broken

OURS = [getattr(fl.strategies, name)() for name in fl.strategies.__all__]


@pytest.mark.parametrize("strategy", OURS, ids=lambda s: type(s).__name__)
def test_every_strategy_of_ours_keeps_every_promise(strategy: fl.Strategy) -> None:
    check_strategy(strategy)


@dataclass(frozen=True)
class Mean(fl.Strategy):
    mixed_ranks = False
    linear = True
    exact = False

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        sent, weights = self.admit(state, updates)
        return fl.State(mean_adapter(state, sent, weights), state.round + 1, seed=state.seed)


class InPlace(Mean):
    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        after = super().aggregate(state, updates, rng)
        for name, pair in state.adapter.pairs.items():
            pair.A.copy_(after.adapter.pairs[name].A)
        return after


class Unordered(Mean):
    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        weights = [1 / len(updates)] * len(updates)
        return fl.State(mean_adapter(state, updates, weights), state.round + 1, seed=state.seed)


class Exact(Mean):
    exact = True


class Random(Mean):
    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        return replace(
            super().aggregate(state, updates, rng), seed=int(np.random.default_rng().integers(2**31))
        )


class Still(Mean):
    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        return replace(super().aggregate(state, updates, rng), round=state.round)


class Unsaid(Mean):
    exact = None  # type: ignore[assignment]


class Loudest(Mean):
    """Drops the update of the largest weight, though a mean were enough by its word."""

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        least = sorted(updates, key=lambda update: update.weight)[:-1] if len(updates) > 1 else updates
        return super().aggregate(state, least, rng)


class Whole(fl.strategies.HetLoRA):
    """Sends every client all ranks."""

    def task(self, state: fl.State, peer: fl.Peer) -> fl.Task:
        return fl.Task(state.adapter)


class Cut(fl.strategies.HetLoRA):
    """Says that a mean is enough, where the weights follow from each update's own norm."""

    linear = True


class Summed(Mean):
    """Takes weights as they are, and not as shares; a client without any moves the state too."""

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        sent, _ = self.admit(state, updates)
        weights = [1e-3 * update.weight + 0.1 for update in sent]
        return fl.State(mean_adapter(state, sent, weights), state.round + 1, seed=state.seed)


class Multiplied(Mean):
    linear = False
    products = True  # it averages factors


@pytest.mark.parametrize(
    ("strategy", "promises"),
    [
        (Unsaid(), {"facts are stated"}),
        (Loudest(), {"linear means"}),
        (Whole(), {"a task fits"}),
        (Cut(), {"linear means"}),
        (Summed(), {"the unit of weights", "weight zero"}),
        (Mean(), set()),
        (InPlace(), {"nothing that is given changes"}),
        (Unordered(), {"the order", "weight zero", "a refused update", "linear means"}),
        (Exact(), {"exact means"}),
        (Multiplied(), {"a bundle stands"}),
        (Random(), {"the same call gives"}),
        (Still(), {"the round counts up"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_promise_is_named(strategy: fl.Strategy, promises: set[str]) -> None:
    named = [name for name, _ in broken(strategy)]
    if not promises:
        check_strategy(strategy)
        return
    assert all(any(promise in name for name in named) for promise in promises), named
    with pytest.raises(AssertionError, match=type(strategy).__name__):
        check_strategy(strategy)
