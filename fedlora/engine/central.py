"""Client-level privacy at the server: who is in a round, and the noised mean that the strategy gets to see.

McMahan, Ramage, Talwar, Zhang. "Learning Differentially Private Recurrent Language Models". ICLR 2018.
https://arxiv.org/abs/1710.06963, their fixed-denominator estimator.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedlora.engine.ledgers import read_ledger, spend
from fedlora.linear import (
    embed,
    factor_change,
    flat,
    form,
    moved_products,
    product_change,
    split,
    with_shared,
)
from fedlora.privacy import ClientLevel, Ledger, Mechanism, Plan
from fedlora.protocol import Peer, State, Task, Update
from fedlora.strategy import Strategy

Node = TypeVar("Node")
MARGIN = 1e-9  # relative, more than the rounding of a norm in float64


class Central:
    """The server's mechanism, for a whole run.

    A round's release is u + (Σ_k w_k clip(Δ_k, C) + N(0, (σ C)² I)) / (q N): Δ_k is what client k has changed
    of what it was sent, u what a client of the largest ranks is sent. The denominator is fixed, so one client
    moves the sum by C at most, whoever else answers, and missing replies leave the noise as it is.

    Args:
        privacy: the settings.
        plan: what follows from them.
        path: the ledger's file.
        widest: a client of the largest ranks; a mean of products is cut to them.
    """

    def __init__(self, privacy: ClientLevel, plan: Plan, path: Path, widest: Peer) -> None:
        self._privacy, self._plan, self._path, self._widest = privacy, plan, path, widest
        self._mechanism: Mechanism | None = None

    @property
    def ledger(self) -> Ledger | None:
        """What all rounds so far have cost; None for nothing."""
        return read_ledger(self._path)

    def refusal(self) -> str | None:
        """Why there must not be another round; None if there may."""
        return self._plan.refusal(self.ledger)

    def sample(self, nodes: Sequence[Node], round: int) -> list[Node]:
        """A round's nodes, each by itself with probability q; by no seed, or anyone could tell who was in."""
        self._mechanism = self._plan.mechanism(-1, round)
        return [nodes[i] for i in self._mechanism.source.chosen(len(nodes), self._plan.q)]

    def release(
        self, strategy: Strategy, state: State, updates: Sequence[Update], tasks: Sequence[Task]
    ) -> Update:
        """The noised mean of a round's updates, as the one update that the strategy needs; paid for first.

        Args:
            strategy: linear in factors, or in products.
            state: the state that the updates answer to.
            updates: those that came; there may be none.
            tasks: what each was sent.
        """
        mechanism, wide = self._mechanism, strategy.task(state, self._widest)
        assert mechanism is not None, "a round begins with its sample"
        self._mechanism = None  # its noise is drawn once
        spend(self._path, self._plan.after(self.ledger))
        changes = [self._change(strategy, t, u, wide) for t, u in zip(tasks, updates, strict=True)]
        weights = [self._privacy.weight(update.weight) for update in updates]
        if strategy.linear:
            sizes = form(wide)
        else:
            whole = {name: pair.shape for name, pair in wide.adapter.pairs.items()}
            sizes = whole | {name: tuple(tensor.shape) for name, tensor in wide.adapter.extra.items()}
        mean = split(noised_mean([flat(c) for c in changes], weights, mechanism, sizes), sizes)
        if not strategy.linear:
            return Update(moved_products(wide, mean))
        scales = {name: pair.scale for name, pair in wide.adapter.pairs.items()}
        start = embed(wide.adapter, sizes, scales)
        return Update(with_shared(wide, {name: start[name] + mean[name] for name in sizes}))

    def _change(self, strategy: Strategy, task: Task, update: Update, wide: Task) -> Mapping[str, Tensor]:
        if strategy.linear:
            return factor_change(task.adapter, update.adapter, wide)
        return product_change(task.adapter, update.adapter)


def noised_mean(
    changes: Sequence[Tensor],
    weights: Sequence[float],
    mechanism: Mechanism,
    sizes: Mapping[str, Sequence[int]],
) -> Tensor:
    """(Σ_k w_k clip(Δ_k) + noise) / denominator, float64.

    Args:
        changes: one vector a client, (n,); one that is not finite counts as zero.
        weights: from 0 to 1.
        mechanism: σ, the clip, the denominator as its batch size, and the noise.
        sizes: the shapes that make up n.
    """
    total = mechanism.source.normals(sum(math.prod(shape) for shape in sizes.values()))
    total *= mechanism.sigma * mechanism.clip
    for change, weight in zip(changes, weights, strict=True):
        norm = float(torch.linalg.vector_norm(change))
        if math.isfinite(norm) and norm > 0:
            total += change.to(total) * (weight * min(1.0, mechanism.clip / (norm * (1 + MARGIN))))
    return total / mechanism.batch_size
