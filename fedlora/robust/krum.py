"""Krum: only those clients count whose changes lie nearest to those of most others."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.core.update_step import RoundUpdates
from fedlora.ranges import check_whole
from fedlora.robust.base import Robust, averages_both, capped
from fedlora.robust.geometry import distances, factor_distances


@dataclass(frozen=True)
class Krum(Robust):
    """Multi-Krum: only those count whose changes lie nearest to those of most others.

    Blanchard, El Mhamdi, Guerraoui, Stainer. "Machine Learning with Adversaries: Byzantine Tolerant Gradient
    Descent". NeurIPS 2017. https://arxiv.org/abs/1703.02757

        score_k = Σ over the n − f − 2 nearest j of ‖Δ_j − Δ_k‖²

    Δ is the change of ΔW = s·B·A and of the head. Where A and B are both averaged, the distances of the
    factors' own changes are added, each kind over its median: A · c and B / c hide any c in one product.
    Clients of unlike data lie far from one another: on skewed labels Krum rejects honest ones, too.

    Args:
        malicious: f, how many clients of a round may be bad; n has to be at least 2f + 3.
        select: how many count, n − f − 2 at most; None takes so many, and 1 is Krum itself.
    """

    malicious: int = 1
    select: int | None = None

    def __post_init__(self) -> None:
        check_whole("robust.malicious", self.malicious)
        check_whole("robust.select", self.select, none=True)

    @property
    def least(self) -> int:
        """2f + 3, and enough to select from."""
        return max(2 * self.malicious + 3, (self.select or 0) + self.malicious + 2)

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        """The selected updates, as they are."""
        updates, tasks = given.updates, given.tasks
        adapters = [update.adapter for update in updates]
        apart = distances(tasks, adapters)
        if averages_both(given.strategy, tasks):
            apart = over_median(apart) + over_median(factor_distances(tasks, adapters, given.wide))
        near = len(updates) - self.malicious - 2
        scores = krum_scores(apart, near)
        chosen = sorted(sorted(range(len(updates)), key=scores.__getitem__)[: self.select or near])
        most = max(scores[k] for k in chosen)
        notes: dict[int, dict[str, Any]] = {}
        for k, update in enumerate(updates):
            if update.peer:
                notes[update.peer.id] = {"krum_score": scores[k]}
                if k not in chosen:
                    why = f"Krum: score {scores[k]:.3g}, those that count have {most:.3g} at most"
                    notes[update.peer.id]["rejected"] = why
        kept, metrics = [updates[k] for k in chosen], {"rejected": len(updates) - len(chosen)}
        return given.become(capped(kept), [tasks[k] for k in chosen], notes, metrics)


def krum_scores(apart: Tensor, near: int) -> list[float]:
    """Each client's sum of squared distances to its `near` nearest others; `apart` is (n, n)."""
    others = apart.clone().fill_diagonal_(math.inf)
    return [float(x) for x in others.sort(dim=1).values[:, :near].sum(dim=1)]


def over_median(apart: Tensor) -> Tensor:
    """Squared distances over the median of those between two clients; as they are where that is zero."""
    n = len(apart)
    between = apart[tuple(torch.triu_indices(n, n, 1))]
    middle = float(between.median()) if len(between) else 0.0
    return apart / middle if middle else apart
