"""Several clients' updates as one, from which a strategy makes the state that it makes of all of them.

An edge of a tree adds up the updates of its clients and sends one. The sum of weights is the weight of it, so
that a mean of means is the mean. It is exact where a strategy reads a weighted mean off its updates, and it
composes: several that stand for several are made one in the same way.

Liu, Zhang, Song, Letaief. "Client-Edge-Cloud Hierarchical Federated Learning". ICC 2020.
https://arxiv.org/abs/1905.06641, with one round of training between two sums, which makes it FedAvg itself.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import mean_extras, mean_tensors, normalised, weighted_sum
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.core.vectors import embed, form, scales, with_shared
from fedlora.errors import ConfigError


@runtime_checkable
class OwnBundle(Protocol):
    """A strategy that is no mean of factors or of products alone, and knows what its updates add up to."""

    def bundle(self, state: State, sent: Sequence[Update], weights: Sequence[float]) -> dict[str, Pair]:
        """Module -> the pair that stands for these updates in `aggregate`.

        Args:
            state: the state that they answer to.
            sent: in the order of their clients' ids; some may stand for several clients themselves.
            weights: theirs, with sum 1.
        """


def bundled(strategy: Strategy | type[Strategy]) -> Literal["factors", "products", "own"] | None:
    """What the updates of several clients add up to for a strategy; None where they do not.

    "factors": the mean of the shared tensors, each by itself (`Strategy.linear`). "products": the mean of the
    products s·B·A (`Strategy.products`). "own": what the strategy says itself, an `OwnBundle`.
    """
    if hasattr(strategy, "bundle"):
        return "own"
    if strategy.products:
        return "products"
    return "factors" if strategy.linear else None


def bundle(strategy: Strategy, state: State, wide: Task, updates: Sequence[Update], peer: Peer) -> Update:
    """One update that stands for several clients.

    Pairs of products are compressed to their rank, at most the sum of the ranks and the smaller side of the
    layer, without loss: `compress` drops what is below rounding.

    Args:
        strategy: the algorithm that is to combine it with others.
        state: the state that the updates answer to.
        wide: the task of a client of the largest ranks, in whose form factors of all ranks can be added.
        updates: at least one, of clients or of what stands for several of them.
        peer: who sends it.

    Raises:
        ConfigError: the strategy's updates do not add up.
        IncompatibleUpdates: these do not: wrong modules, shapes, ranks or weights.
    """
    kind = bundled(strategy)
    if kind is None:
        raise ConfigError(f"strategy {type(strategy).__name__}: the updates of several clients are no update")
    updates = sorted(updates, key=lambda update: update.peer.id if update.peer else -1)
    weight = math.fsum(update.weight for update in updates)
    w = normalised([update.weight if weight else 1.0 for update in updates])
    adapter = _mean(strategy, kind, state, wide, updates, w)
    return Update(adapter, weight, peer, version=updates[0].version, several=True)


def forwarded(strategy: Strategy, wide: Task) -> list[str]:
    """The names of the tensors that are a bundle's own; all others are those of the widest task."""
    if bundled(strategy) == "factors":
        return wide.shared()
    pairs = [
        f"{module}.{factor}" for module, pair in wide.adapter.pairs.items() for factor, _ in pair.factors()
    ]
    return [*pairs, *(name for name in wide.shared() if name in wide.adapter.extra)]


def _mean(
    strategy: Strategy,
    kind: str,
    state: State,
    wide: Task,
    updates: Sequence[Update],
    weights: Sequence[float],
) -> Adapter:
    shapes, like = form(wide), dict(wide.adapter.tensors())
    if kind == "factors":
        each = [embed(update.adapter, shapes, scales(wide)) for update in updates]
        return with_shared(
            wide, {name: mean_tensors([own[name] for own in each], weights).to(like[name]) for name in shapes}
        )
    if isinstance(strategy, OwnBundle):
        pairs = strategy.bundle(state, updates, weights)
    else:
        pairs = {
            name: weighted_sum([update.adapter.pairs[name] for update in updates], weights, pair.scale)
            for name, pair in wide.adapter.pairs.items()
        }
    return replace(
        wide.adapter, pairs=pairs, extra=mean_extras([update.adapter.extra for update in updates], weights)
    )
