"""Client-level privacy at the server: it samples the clients of a round and releases their noised mean.

McMahan, Ramage, Talwar, Zhang. "Learning Differentially Private Recurrent Language Models". ICLR 2018.
https://arxiv.org/abs/1710.06963; this is their fixed-denominator estimator.
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
    """The Gaussian mechanism that the server applies in every round of a run.

    A round releases u + (Σ_k w_k clip(Δ_k, C) + N(0, (σ C)² I)) / (q N). Δ_k is the change that client k made
    to the parameters it received, 0 ≤ w_k ≤ 1, and u are the parameters that a client of the largest ranks
    receives. The denominator is a constant: it is neither the number of clients that answered nor the sum of
    their weights.

    **Without secure aggregation** `sample` includes each client with probability q, independently, and every
    round is released. Consider two runs of which one lacks client c, and let all other clients be sampled and
    fail alike in both. Then the sums differ by w_c clip(Δ_c, C) if c was sampled and answered, and are equal
    otherwise, so their distance is at most C. The release does not depend on any count: if nobody answers,
    the sum is zero and noise is released. Under adding or removing one client, a round is therefore a
    Poisson-subsampled Gaussian mechanism of sensitivity C and sampling rate q.

    **With secure aggregation** (the plan has q = 1) the server learns the sum only if enough members of the
    round deliver (`fedlora.secure_aggregation.protocol`), and the sum of a small sample reveals a single
    client. The number of members is therefore fixed, the run's seed chooses them, and the analysis takes no
    credit for sampling. Consider two runs that differ in the updates of client c, which are all replaced by
    zeros in one of them. Presence, membership and delivery do not depend on the content of an update: a
    client sends a vector of the same length whatever it has learned, and sends zeros for a change that is not
    finite. So the sum is known in both runs or in neither. If it is not known, neither run releases anything
    and both keep the state. If it is known, the sums differ by at most w_c clip(Δ_c, C), and a round is a
    Gaussian mechanism of sensitivity C. The same is not true for adding or removing a client: its presence
    can decide whether the sum is known, and everybody sees whether a round had a sum. The ledger's unit is
    therefore "contribution", with presence and failures public. The guarantee does not cover a client that
    its own rows cause to fail or to be late.

    Args:
        privacy: the settings.
        plan: the parameters that follow from the settings, see `ClientLevel.plan`.
        path: the file of the ledger.
    """

    def __init__(self, privacy: ClientLevel, plan: Plan, path: Path) -> None:
        self._privacy, self._plan, self._path = privacy, plan, path
        self._mechanism: Mechanism | None = None

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of all rounds so far; None before the first release."""
        return read_ledger(self._path)

    @property
    def terms(self) -> dict[str, Any]:
        """The clip and the weight cap, which clients apply themselves under secure aggregation."""
        return {"clip": self._privacy.clip, "cap": self._privacy.example_cap}

    def refusal(self) -> str | None:
        """Why another round would exceed the budget; None if it would not."""
        return self._plan.refusal(self.ledger)

    def sample(self, nodes: Sequence[Node], round: int) -> list[Node]:
        """Begin a round: a Poisson sample of the nodes, each included with probability q, independently.

        The sample does not follow the run's seed, from which anyone could compute it. With q = 1 it is all
        nodes.
        """
        self._mechanism = self._plan.mechanism(-1, round)
        return [nodes[i] for i in self._mechanism.source.chosen(len(nodes), self._plan.q)]

    def total(
        self, strategy: Strategy, wide: Task, updates: Sequence[Update], tasks: Sequence[Task]
    ) -> Tensor:
        """The sum Σ_k w_k clip(Δ_k) over the updates that arrived, (n,), float64.

        Δ_k is the change of the factors, or of the products B·A where the strategy averages products.

        Args:
            strategy: it takes a mean of factors, or of products.
            wide: the task of a client of the largest ranks in the run.
            updates: the updates that arrived; there may be none.
            tasks: for each update, the task that its client received.
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
        """The noised mean of a round as a single update. The ledger is written before the noise is drawn.

        Args:
            strategy: as for `total`.
            wide: as for `total`.
            total: the sum of clipped changes, (n,).

        Raises:
            IncompatibleUpdates: the sum has another length. Nothing is written to the ledger then.
        """
        mechanism, sizes = self._mechanism, _sizes(strategy, wide)
        assert mechanism is not None, "a round begins with its sample"
        if total.shape != (_length(sizes),):
            raise IncompatibleUpdates(f"expected a sum of {_length(sizes)} numbers, got {tuple(total.shape)}")
        self._mechanism = None  # a mechanism serves one release
        spent = self.ledger
        spend(self._path, spent, self._plan.after(spent))
        noise = mechanism.source.normals(len(total)) * (mechanism.sigma * mechanism.clip)
        mean = split((total + noise) / mechanism.batch_size, sizes)
        return Update(moved_factors(wide, mean) if strategy.linear else moved_products(wide, mean))


def _sizes(strategy: Strategy, wide: Task) -> Form:
    """The names and shapes of the parameters in the sum."""
    if strategy.linear:
        return form(wide)
    whole = {name: pair.shape for name, pair in wide.adapter.pairs.items()}
    return whole | {name: tuple(tensor.shape) for name, tensor in wide.adapter.extra.items()}


def _length(sizes: Form) -> int:
    return sum(math.prod(shape) for shape in sizes.values())
