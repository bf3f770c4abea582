"""Client-level privacy at the server: who is in a round, and the noised mean that the strategy gets to see.

McMahan, Ramage, Talwar, Zhang. "Learning Differentially Private Recurrent Language Models". ICLR 2018.
https://arxiv.org/abs/1710.06963, their fixed-denominator estimator.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedlora.engine.ledgers import read_ledger, spend
from fedlora.linear import (
    Form,
    clipped,
    factor_change,
    flat,
    form,
    moved_factors,
    moved_products,
    product_change,
    split,
)
from fedlora.privacy import ClientLevel, Ledger, Mechanism, Plan
from fedlora.protocol import Peer, State, Task, Update
from fedlora.strategy import Strategy

Node = TypeVar("Node")


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

    @property
    def terms(self) -> dict[str, Any]:
        """What clients that send under masks have to do themselves, for `SecureSum`."""
        return {"clip": self._privacy.clip, "cap": self._privacy.example_cap}

    def refusal(self) -> str | None:
        """Why there must not be another round; None if there may."""
        return self._plan.refusal(self.ledger)

    def sample(self, nodes: Sequence[Node], round: int) -> list[Node]:
        """A round's nodes, each by itself with probability q; by no seed, or anyone could tell who was in."""
        self._mechanism = self._plan.mechanism(-1, round)
        return [nodes[i] for i in self._mechanism.source.chosen(len(nodes), self._plan.q)]

    def total(
        self, strategy: Strategy, state: State, updates: Sequence[Update], tasks: Sequence[Task]
    ) -> Tensor:
        """Σ_k w_k clip(Δ_k) of what came, (n,), float64; of factors or, where it is they, of products.

        Args:
            strategy: linear in factors, or in products.
            state: the state that the updates answer to.
            updates: those that came; there may be none.
            tasks: what each was sent.
        """
        wide = strategy.task(state, self._widest)
        total = torch.zeros(
            sum(math.prod(shape) for shape in _sizes(strategy, wide).values()), dtype=torch.float64
        )
        for task, update in zip(tasks, updates, strict=True):
            if strategy.linear:
                change = factor_change(task.adapter, update.adapter, wide)
            else:
                change = product_change(task.adapter, update.adapter)
            bounded = clipped(flat(change), self._privacy.clip)
            total += self._privacy.weight(update.weight) * bounded.to(total)
        return total

    def release(self, strategy: Strategy, state: State, total: Tensor) -> Update:
        """The noised mean of a round, as the one update that the strategy needs; paid for first.

        Args:
            strategy: as for `total`.
            state: the state that the updates answered to.
            total: the sum of clipped changes.
        """
        mechanism, wide = self._mechanism, strategy.task(state, self._widest)
        assert mechanism is not None, "a round begins with its sample"
        self._mechanism = None  # its noise is drawn once
        spent = self.ledger
        spend(self._path, spent, self._plan.after(spent))
        noise = mechanism.source.normals(len(total)) * (mechanism.sigma * mechanism.clip)
        sizes = _sizes(strategy, wide)
        mean = split((total + noise) / mechanism.batch_size, sizes)
        return Update(moved_factors(wide, mean) if strategy.linear else moved_products(wide, mean))


def _sizes(strategy: Strategy, wide: Task) -> Form:
    """The names and shapes of what is summed."""
    if strategy.linear:
        return form(wide)
    whole = {name: pair.shape for name, pair in wide.adapter.pairs.items()}
    return whole | {name: tuple(tensor.shape) for name, tensor in wide.adapter.extra.items()}
