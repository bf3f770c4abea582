"""What every strategy promises, whichever it is: `fedlora.strategies.__all__` decides who is held to it."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora import strategies
from fedlora.adapter import Adapter, Pair
from fedlora.errors import IncompatibleUpdates
from fedlora.protocol import Peer, State, Update

STRATEGIES = [getattr(strategies, name) for name in strategies.__all__]
LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
LARGEST = 12  # over the smaller side of every layer
ALPHA = 16.0


def peer(id: int, rank: int, **ranks: int) -> Peer:
    """A peer of scales alpha / r, r its own rank of each module."""
    return Peer(id, rank, ranks, {m: ALPHA / ranks.get(m, rank) for m in LAYERS})


# Ids out of order; peers of one rank hold other scales too, which no strategy may ignore.
ONE_RANK = [Peer(7, LARGEST), Peer(2, LARGEST, {}, dict.fromkeys(LAYERS, 3.0)), Peer(5, LARGEST)]
MIXED = [peer(7, LARGEST), peer(2, 1), peer(5, 3, tall=2, wide=LARGEST), peer(3, 6, square=5)]


@pytest.fixture(params=STRATEGIES, ids=strategies.__all__)
def strategy(request):
    return request.param()


@pytest.fixture
def peers(strategy):
    return MIXED if strategy.mixed_ranks else ONE_RANK


@pytest.fixture
def weights(peers):
    return [3.0, 1.0, 2.0, 5.0][: len(peers)]


@pytest.fixture
def state(strategy, make, rng, dtype):
    return strategy.init(make.adapter(rng, LAYERS, LARGEST, 0.7, dtype))


@pytest.fixture
def dtype():
    return torch.float64


@pytest.fixture
def updates(strategy, make, rng, state, peers, weights):
    return make.round(rng, strategy, state, peers, weights)


@pytest.fixture(scope="session")
def layers():
    return LAYERS


@pytest.fixture(scope="session")
def largest():
    return LARGEST


@pytest.fixture(scope="session")
def mixed():
    return MIXED


def _aggregate(strategy, state, updates) -> State:
    return strategy.aggregate(state, updates, np.random.default_rng(11))


@pytest.fixture(scope="session")
def aggregate():
    return _aggregate


def _outcome(call):
    """What a call returns, or the refusal that it raises."""
    try:
        return call()
    except IncompatibleUpdates as refusal:
        return refusal


@pytest.fixture(scope="session")
def outcome():
    return _outcome


def _same_model(np64, one: State, two: State, tol: float = 1e-12) -> bool:
    """Equal effective updates and extras, whatever the factors."""
    deltas = all(np64.close(one.delta(m), two.delta(m), tol) for m in LAYERS)
    extras = one.adapter.extra.keys() == two.adapter.extra.keys()
    return (
        deltas
        and extras
        and all(np64.close(t, two.adapter.extra[n], tol) for n, t in one.adapter.extra.items())
    )


@pytest.fixture(scope="session")
def same_model():
    return _same_model


def _weighted(updates, weights) -> list[Update]:
    return [dataclasses.replace(u, weight=w) for u, w in zip(updates, weights, strict=True)]


@pytest.fixture(scope="session")
def weighted():
    return _weighted


def _with_pair(update: Update, module: str, pair: Pair) -> Update:
    pairs = {**update.adapter.pairs, module: pair}
    return dataclasses.replace(update, adapter=Adapter(pairs, update.adapter.extra))


@pytest.fixture(scope="session")
def with_pair():
    return _with_pair
