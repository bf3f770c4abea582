"""A small federation of random layers and updates, on which the promises of an author's code are tried."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy, next_state

LAYERS = {"tall": (11, 4), "square": (6, 6), "wide": (5, 9)}
LARGEST = 12  # over the smaller side of every layer
ONE_RANK = (Peer(7, LARGEST), Peer(2, LARGEST), Peer(5, LARGEST))
MIXED = (Peer(7, LARGEST), Peer(2, 1), Peer(5, 3))
WEIGHTS = (3.0, 1.0, 2.0)


@dataclass(frozen=True)
class Round:
    """One round of the small federation.

    Args:
        strategy: what is checked.
        state: the state before the round.
        peers: who takes part.
        updates: what they send.
        old: an earlier state, or the same in the first round.
        late: updates of the peers that answer to it.
    """

    strategy: Strategy
    state: State
    peers: Sequence[Peer]
    updates: Sequence[Update]
    old: State
    late: Sequence[Update]

    def aggregate(self, updates: Sequence[Update] | None = None) -> State:
        """The next state, from the round's own updates or from others."""
        sent = list(self.updates if updates is None else updates)
        return next_state(self.strategy, self.state, sent, np.random.default_rng(11))


def federation(strategy: Strategy, seed: int) -> Iterator[Round]:
    """The first round and the third."""
    rng = np.random.default_rng(seed)
    peers = MIXED if getattr(strategy, "mixed_ranks", False) else ONE_RANK
    pairs = {m: Pair(random(rng, LARGEST, b), random(rng, a, LARGEST), 0.7) for m, (a, b) in LAYERS.items()}
    head = {"head.weight": random(rng, 2, 3), "head.bias": random(rng, 2)}
    state = strategy.init(Adapter(pairs, head))
    for number in range(3):
        updates = [trained(rng, strategy, state, *each) for each in zip(peers, WEIGHTS, strict=True)]
        if number == 0:
            old, late = state, updates
        one = Round(strategy, state, peers, updates, old, late)
        if number in (0, 2):
            yield copy.deepcopy(one)  # before aggregate can write into it
        state = one.aggregate()


def trained(rng: np.random.Generator, strategy: Strategy, state: State, peer: Peer, weight: float) -> Update:
    """What the server sees of a client that has trained: what it shares has moved, nothing else has."""
    task = strategy.task(state, peer)
    shared = set(task.shared())

    def after(name: str, tensor: Tensor) -> Tensor:
        return tensor + 0.3 * random(rng, *tensor.shape) if name in shared else tensor.clone()

    adapter = task.adapter.with_tensors(
        {name: after(name, tensor) for name, tensor in task.adapter.tensors()}
    )
    return Update(adapter, weight, peer, {"loss": 1.0})


def effective(task: Task, adapter: Adapter, module: str) -> Tensor:
    """All that a client's model adds to a module's weight."""
    found = torch.zeros(LAYERS[module], dtype=torch.float64)
    for pairs in (task.base_delta, adapter.plain().pairs):
        if module in pairs:
            found = found + dense(pairs[module])
    return found


def random(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers of a shape, in float64."""
    return torch.from_numpy(rng.standard_normal(shape))
