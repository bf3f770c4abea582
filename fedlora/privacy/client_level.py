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

from fedlora.core.messages import Task, Update
from fedlora.core.strategy import Strategy
from fedlora.core.vectors import (
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
from fedlora.errors import IncompatibleUpdates
from fedlora.privacy import ClientLevel, Ledger, Mechanism, Plan
from fedlora.privacy.ledger_files import read_ledger, spend

Node = TypeVar("Node")


class ClientLevelMechanism:
    """The server's mechanism, for a whole run.

    A round's release is u + (Σ_k w_k clip(Δ_k, C) + N(0, (σ C)² I)) / (q N): Δ_k is what client k has changed
    of what it was sent, 0 ≤ w_k ≤ 1, and u is what a client of the largest ranks is sent. The denominator is
    fixed: it is neither the number of clients that answered nor the sum of their weights.

    **Plain rounds** (`sample` draws each client with probability q, and every round is released). Take two
    runs, one of which lacks client c. Give the other clients the same draws and the same failures in both.
    Then the sums differ by w_c clip(Δ_c, C) if c was drawn and answered, and by nothing otherwise, so their
    distance is at most C. No count stands between the draw and the release: with no answer at all the sum is
    zero, and noise is released. A round is therefore a Poisson-sampled Gaussian mechanism of sensitivity C
    and rate q, to adding or removing a client.

    **Rounds under masks** (the plan has q = 1). The sum is known only if enough of the round's members have
    delivered (`fedlora.secure_aggregation.protocol`), and a server that sees the sum of a small draw sees a
    client. So the number of members is fixed, the run's seed chooses them, and nothing is claimed for the
    draw. Take two runs in which the updates of client c differ: in one of them they are all replaced by
    zeros. Who is there, who is a member and who delivers does not follow from what the updates hold, since a
    client sends a vector of the same length whatever it has learned, and a change that is not finite is sent
    as zero. Hence the sum is known in both runs or in neither. If it is not, neither run releases anything
    and both keep the state; if it is, the sums differ by w_c clip(Δ_c, C) at most, and a round is a Gaussian
    mechanism of sensitivity C. This does not hold for adding or removing a client: its presence can be what
    makes the sum known, and "no sum" against "a sum of m clients" is seen by everybody. The ledger therefore
    counts the unit "contribution", which says that presence and failures are known. A client whose rows make
    it fail, or make it late, is outside of the claim, as a client that failed is elsewhere.

    Args:
        privacy: the settings.
        plan: what follows from them.
        path: the ledger's file.
    """

    def __init__(self, privacy: ClientLevel, plan: Plan, path: Path) -> None:
        self._privacy, self._plan, self._path = privacy, plan, path
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
        """Draw a round's clients, each by itself with probability q, and begin the round.

        The draw follows no seed, or anyone could tell who was in. With q = 1 it takes all of `nodes`.
        """
        self._mechanism = self._plan.mechanism(-1, round)
        return [nodes[i] for i in self._mechanism.source.chosen(len(nodes), self._plan.q)]

    def total(
        self, strategy: Strategy, wide: Task, updates: Sequence[Update], tasks: Sequence[Task]
    ) -> Tensor:
        """Σ_k w_k clip(Δ_k) of what came, (n,), float64; of factors or, where it is they, of products.

        Args:
            strategy: linear in factors, or in products.
            wide: the task of a client of the largest ranks that the run can serve.
            updates: those that came; there may be none.
            tasks: what each was sent.
        """
        total = torch.zeros(_length(_sizes(strategy, wide)), dtype=torch.float64)
        for task, update in zip(tasks, updates, strict=True):
            if strategy.linear:
                change = factor_change(task.adapter, update.adapter, wide)
            else:
                change = product_change(task.adapter, update.adapter)
            bounded = clipped(flat(change), self._privacy.clip)
            total += self._privacy.weight(update.weight) * bounded.to(total)
        return total

    def release(self, strategy: Strategy, wide: Task, total: Tensor) -> Update:
        """The noised mean of a round, as the one update that the strategy needs; paid for first.

        Args:
            strategy: as for `total`.
            wide: as for `total`.
            total: the sum of clipped changes.

        Raises:
            IncompatibleUpdates: the sum is not one of such changes. Nothing has been paid for it then.
        """
        mechanism, sizes = self._mechanism, _sizes(strategy, wide)
        assert mechanism is not None, "a round begins with its sample"
        if total.shape != (_length(sizes),):
            raise IncompatibleUpdates(f"expected a sum of {_length(sizes)} numbers, got {tuple(total.shape)}")
        self._mechanism = None  # its noise is drawn once
        spent = self.ledger
        spend(self._path, spent, self._plan.after(spent))
        noise = mechanism.source.normals(len(total)) * (mechanism.sigma * mechanism.clip)
        mean = split((total + noise) / mechanism.batch_size, sizes)
        return Update(moved_factors(wide, mean) if strategy.linear else moved_products(wide, mean))


def _sizes(strategy: Strategy, wide: Task) -> Form:
    """The names and shapes of what is summed."""
    if strategy.linear:
        return form(wide)
    whole = {name: pair.shape for name, pair in wide.adapter.pairs.items()}
    return whole | {name: tuple(tensor.shape) for name, tensor in wide.adapter.extra.items()}


def _length(sizes: Form) -> int:
    return sum(math.prod(shape) for shape in sizes.values())
