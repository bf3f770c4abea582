"""Rules between the clients' updates and a strategy, so that a few bad clients cannot turn a round.

A rule makes updates out of updates, and the strategy combines those as ever. It looks at what a client
changed of what it was sent, so that clients of different ranks, who start from different cuts, can be held
against one another. Under every rule a number of examples counts no more than the round's median: of n
clients none weighs over 2/n, whatever it says it has.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.errors import ConfigError
from fedlora.privacy import ClientLevel, Privacy
from fedlora.robust.geometry import Segment, distances, factor_distances
from fedlora.rounds.round_config import RoundConfig


@dataclass(frozen=True)
class Screened:
    """What a rule leaves of a round.

    Args:
        updates: what the strategy combines.
        tasks: what each of them answers to.
        notes: client -> what its line of the log says of it.
        metrics: for the round's line.
    """

    updates: list[Update]
    tasks: list[Task]
    notes: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Robust(ABC):
    """A rule. Subclasses are frozen dataclasses of its settings, and pure."""

    @property
    def least(self) -> int:
        """With fewer updates the rule cannot tell good from bad, and the round changes nothing."""
        return 3

    def check(self, strategy: Strategy, rules: RoundConfig, privacy: Privacy | None) -> None:
        """Refuse what the rule cannot work with.

        Args:
            strategy: the algorithm.
            rules: those of the run.
            privacy: the run's.

        Raises:
            ConfigError: says what, and why.
        """
        if rules.secure_sum or isinstance(privacy, ClientLevel):
            what = "secure_sum" if rules.secure_sum else "privacy=client_level"
            raise ConfigError(
                f"robust: under {what} the strategy is shown a sum, and no update could be held against the "
                "others; use robust=none (client-level privacy bounds every client already)"
            )
        if strategy.personal:
            raise ConfigError(
                f"robust: clients of {type(strategy).__name__} keep a part of their models, what they send "
                "says too little of what it does; use a strategy with one global model, or robust=none"
            )
        if (sampled := rules.enough(rules.clients)) < self.least:
            raise ConfigError(
                f"robust: {type(self).__name__} needs at least {self.least} clients a round, got {sampled}; "
                "raise clients and clients_per_round"
            )

    @abstractmethod
    def screen(
        self,
        strategy: Strategy,
        state: State,
        updates: Sequence[Update],
        tasks: Sequence[Task],
        widest: Peer,
    ) -> Screened:
        """What the strategy is to combine, in the place of these updates.

        Args:
            strategy: the algorithm.
            state: the state that the updates answer to.
            updates: at least one.
            tasks: what each client was sent.
            widest: a client of the largest ranks.
        """


@dataclass(frozen=True)
class NormBound(Robust):
    """No client changes more than most do: a longer change goes back towards where the client started.

    Sun, Kairouz, Suresh, McMahan. "Can You Really Backdoor Federated Learning?". 2019.
    https://arxiv.org/abs/1911.07963. Their bound is a number; here it follows the round's median.

    The length is that of all changes of ΔW and of the head together. Where A and B are both averaged, it is
    also that of the factors' own change, since A · c and B / c hide any c in one and the same product.

    Args:
        multiple: of the median length of the round's clients, which is the bound.
        bound: the length itself instead, for the change of ΔW and the head.
    """

    multiple: float = 1.0
    bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("multiple", "bound"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"robust.{name}: expected a number above 0, got {value}")

    def screen(
        self,
        strategy: Strategy,
        state: State,
        updates: Sequence[Update],
        tasks: Sequence[Task],
        widest: Peer,
    ) -> Screened:
        """Every update as far along its own segment as the bound allows."""
        ways = [Segment.of(task, update.adapter) for task, update in zip(tasks, updates, strict=True)]
        bound = self.bound or self.multiple * median_low(way.length() for way in ways)
        raw = math.inf
        if averages_both(strategy, tasks):
            raw = self.multiple * median_low(way.raw for way in ways)
        kept = [way.within(bound, raw) for way in ways]
        bounded = [
            replace(update, adapter=way.at(t))
            for update, way, t in zip(capped(updates), ways, kept, strict=True)
        ]
        notes = {
            update.peer.id: {"change": way.length(), **({"kept": t} if t < 1 else {})}
            for update, way, t in zip(updates, ways, kept, strict=True)
            if update.peer
        }
        told = {"bound": bound, "bounded": sum(t < 1 for t in kept)}
        return Screened(bounded, list(tasks), notes, told)


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
        for name in ("malicious", "select"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"robust.{name}: expected a whole number of at least 1, got {value!r}")

    @property
    def least(self) -> int:
        """2f + 3, and enough to select from."""
        return max(2 * self.malicious + 3, (self.select or 0) + self.malicious + 2)

    def screen(
        self,
        strategy: Strategy,
        state: State,
        updates: Sequence[Update],
        tasks: Sequence[Task],
        widest: Peer,
    ) -> Screened:
        """The selected updates, as they are."""
        adapters = [update.adapter for update in updates]
        apart = distances(tasks, adapters)
        if averages_both(strategy, tasks):
            wide = strategy.task(state, widest)
            apart = over_median(apart) + over_median(factor_distances(tasks, adapters, wide))
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
        kept, told = [updates[k] for k in chosen], {"rejected": len(updates) - len(chosen)}
        return Screened(capped(kept), [tasks[k] for k in chosen], notes, told)


def krum_scores(apart: Tensor, near: int) -> list[float]:
    """Each client's sum of squared distances to its `near` nearest others; `apart` is (n, n)."""
    others = apart.clone().fill_diagonal_(math.inf)
    return [float(x) for x in others.sort(dim=1).values[:, :near].sum(dim=1)]


def capped(updates: Sequence[Update]) -> list[Update]:
    """The updates with weights of no more than their median, the lower one of two."""
    most = median_low(update.weight for update in updates)
    return [replace(update, weight=min(update.weight, most)) for update in updates]


def averages_both(strategy: Strategy, tasks: Sequence[Task]) -> bool:
    """Whether the strategy may average A by itself and B by itself, so that it matters how ΔW is split."""
    return not strategy.products and all({"A", "B"} <= task.share for task in tasks)


def over_median(apart: Tensor) -> Tensor:
    """Squared distances over the median of those between two clients; as they are where that is zero."""
    n = len(apart)
    between = apart[tuple(torch.triu_indices(n, n, 1))]
    middle = float(between.median()) if len(between) else 0.0
    return apart / middle if middle else apart
