"""What every strategy promises, whichever it is: `fedlora.strategies.__all__` decides who is held to it.

Each promise is held at the first round and at the fourth, by when stages have changed and factors have taken
turns, and for every choice that a strategy's fields offer.
"""

import copy
import dataclasses
import itertools
import typing

import numpy as np
import pytest
import torch

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Update
from fedlora.errors import ConfigError, IncompatibleUpdates

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
LARGEST = 12  # over the smaller side of every layer
ALPHA = 16.0
ROUNDS = (0, 3)  # what a state has behind it
RUNS: dict[typing.Any, list[State]] = {}


def choices(cls):
    """One of a class for every combination of its yes-or-no and its word fields, the default first."""
    hints = typing.get_type_hints(cls)
    options = {}
    for field in dataclasses.fields(cls):
        if hints[field.name] is bool:
            options[field.name] = (False, True)
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            options[field.name] = typing.get_args(hints[field.name])
    found = [cls()]
    for values in itertools.product(*options.values()):
        try:
            found.append(cls(**dict(zip(options, values, strict=True))))
        except ConfigError:  # words that do not go together
            continue
    return [one for i, one in enumerate(found) if one not in found[:i]]


STRATEGIES = [one for name in strategies.__all__ for one in choices(getattr(strategies, name))]


def peer(id: int, rank: int, **ranks: int) -> Peer:
    """A peer of scales alpha / r, r its own rank of each module."""
    return Peer(id, rank, ranks, {m: ALPHA / ranks.get(m, rank) for m in LAYERS})


# Ids out of order; peers of one rank hold other scales too, which no strategy may ignore.
ONE_RANK = [Peer(7, LARGEST), Peer(2, LARGEST, {}, dict.fromkeys(LAYERS, 3.0)), Peer(5, LARGEST)]
MIXED = [peer(7, LARGEST), peer(2, 1), peer(5, 3, tall=2, wide=LARGEST), peer(3, 6, square=5)]


@pytest.fixture(params=STRATEGIES, ids=lambda s: repr(s).replace("()", ""))
def strategy(request):
    return request.param


@pytest.fixture
def peers(strategy):
    return MIXED if strategy.mixed_ranks else ONE_RANK


@pytest.fixture
def weights(peers):
    return [3.0, 1.0, 2.0, 5.0][: len(peers)]


@pytest.fixture(params=ROUNDS, ids=lambda done: f"after{done}")
def done(request):
    return request.param


@pytest.fixture
def states(strategy, make, peers, weights, dtype):
    """The states of a run, from the first on; of the largest rank, or of one that holds less than a layer."""

    def run(most: int = LARGEST) -> list[State]:
        if (strategy, dtype, most) not in RUNS:
            rng, own = np.random.default_rng(23), [_small(one, most) for one in peers]
            found = [strategy.init(make.adapter(rng, LAYERS, most, 0.7, dtype))]
            for _ in range(4):
                sent = make.round(rng, strategy, found[-1], own, weights, 0.3)
                found.append(_aggregate(strategy, found[-1], sent))
            RUNS[strategy, dtype, most] = found
        return copy.deepcopy(RUNS[strategy, dtype, most])  # whatever a test does to them

    return run


def _small(peer: Peer, most: int) -> Peer:
    """The peer with no rank above the most."""
    ranks = {m: min(rank, most) for m, rank in peer.ranks.items()}
    return dataclasses.replace(peer, rank=min(peer.rank, most), ranks=ranks)


@pytest.fixture(scope="session")
def small():
    return _small


@pytest.fixture
def state(states, done):
    return states()[done]


@pytest.fixture
def dtype():
    return torch.float64


@pytest.fixture
def updates(strategy, make, rng, state, peers, weights):
    sent = make.round(rng, strategy, state, peers, weights)
    return [dataclasses.replace(u, metrics={"loss": 1 + i / 4}) for i, u in enumerate(sent)]


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
    """Equal effective updates, extras and memories, whatever the factors."""
    pairs = [(one.delta(m), two.delta(m)) for m in LAYERS]
    for ours, theirs in ((one.adapter.extra, two.adapter.extra), (one.memory, two.memory)):
        if ours.keys() != theirs.keys():
            return False
        pairs += [(tensor, theirs[name]) for name, tensor in ours.items()]
    return all(a.dtype == b.dtype and _close(np64, a, b, tol) for a, b in pairs)


def _close(np64, one: torch.Tensor, two: torch.Tensor, tol: float) -> bool:
    """Equal within a tolerance that no dtype can go below; a NaN is equal to itself."""
    if not one.is_floating_point():
        return torch.equal(one, two)
    tol = max(tol, 4 * torch.finfo(one.dtype).eps) if one.dtype != torch.float64 else tol
    one, two = one.double(), two.double()
    return torch.allclose(one, two, 0, 0, equal_nan=True) or np64.close(one, two, tol)


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


@pytest.fixture
def needs_pairs(strategy, state, peers):
    """For claims on pairs: a stage may train something else, such as values at sparse places or a gate."""
    if not strategy.task(state, peers[0]).adapter.pairs:
        pytest.skip("no pair travels in this round")


@pytest.fixture
def needs_extra(strategy, state, peers):
    """For claims on the head: clients may keep theirs."""
    task = strategy.task(state, peers[0])
    if not task.shared() or "head.weight" not in task.shared():
        pytest.skip("no head travels in this round")


@pytest.fixture
def effective(strategy, np64, state):
    """From a sent update to all that its client's model adds to a module's weight."""

    def find(update: Update, module: str) -> np.ndarray:
        task = strategy.task(state, update.peer)
        return np64.effective(task, update.adapter, module, LAYERS[module])

    return find
