"""Aggregation of a buffer whose updates may answer to old states: their changes are added to the newest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median_low

import numpy as np
from flwr.app import Message

from fedlora.core.algebra import normalised
from fedlora.core.changes import Change
from fedlora.core.messages import Peer, Task, Update
from fedlora.core.update_step import RoundUpdates
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.aggregation.base import Aggregated, Aggregation, Delivery
from fedlora.rounds.aggregation.plain import PlainAggregation
from fedlora.rounds.sanity_checks import check_changed_state


class BufferDelivery(Delivery):
    """A buffer: updates in the clear, which answer to tasks of this round or of an earlier one.

    Args:
        nodes: the nodes that may be sent a task in this round.
        oldest: the first round whose tasks may still be answered.
        whole: whether nobody is at work when the buffer is full, so that it is a synchronous round.
    """

    def __init__(self, nodes: Sequence[int], oldest: int = 0, whole: bool = False) -> None:
        super().__init__(nodes)
        self.oldest, self.whole = oldest, whole

    def read(self, reply: Message, task: Task, peer: Peer, round: int) -> Update:
        """The update that a reply holds.

        Raises:
            IncompatibleUpdates: it holds none, or it answers to a round that is too long ago.
        """
        update = super().read(reply, task, peer, round)
        if round < self.oldest:
            raise IncompatibleUpdates(
                f"its task is of round {round}, and scheduler.max_staleness takes none from before round "
                f"{self.oldest}"
            )
        return update


@dataclass(frozen=True)
class BufferedAggregation(Aggregation):
    """The clients' changes are weighted by their age and added; a buffer that is a whole round is averaged.

    With n̂_k a client's number of examples, no more than `cap` times the buffer's (lower) median, c_k is
    lr · s(τ_k) · n̂_k / Σ_j n̂_j. The denominator is the sum over the buffer without s: a buffer of old
    updates moves the state by less.

    Args:
        plain: what stands between the clients and the strategy, as in synchronous rounds.
        factor: s, from the number of versions that an update is behind.
        lr: η.
        cap: see above; None does not cap.
    """

    plain: PlainAggregation
    factor: Callable[[int], float]
    lr: float = 1.0
    cap: float | None = None

    @classmethod
    def of(
        cls, synchronous: Aggregation, factor: Callable[[int], float], lr: float, cap: float | None = None
    ) -> "BufferedAggregation":
        """The aggregation of a run whose updates of one version are combined so."""
        assert isinstance(synchronous, PlainAggregation), "runner.compatibility refuses the others"
        return cls(synchronous, factor, lr, cap)

    def least(self, needed: int) -> int:
        """What the settings ask for, and what every step needs."""
        return self.plain.least(needed)

    def aggregate(self, given: RoundUpdates, delivery: Delivery, rng: np.random.Generator) -> Aggregated:
        """Average a whole round of the newest version by the strategy's rule; add the changes of others."""
        ages = [_age(given, update) for update in given.updates]
        whole = isinstance(delivery, BufferDelivery) and delivery.whole
        noted = {u.peer.id: {"staleness": age} for u, age in zip(given.updates, ages, strict=True) if u.peer}
        given = given.become(given.updates, notes=noted, metrics={"staleness": fmean(ages)})
        if whole and self.lr == 1 and not any(ages):
            return self.plain.aggregate(given, delivery, rng)
        given, odd = self.plain.stepped(given)
        before, strategy = given.state, given.strategy
        state = strategy.apply_changes(before, self._changes(given))
        numbers, wrong = check_changed_state(strategy, before, state, given.updates, given.tasks)
        metrics = {**state.metrics, **given.metrics, **numbers}
        answered = list(zip(given.updates, given.tasks, strict=True))
        idle = replace(before, round=before.round + 1)  # changes of nothing are added to nothing
        return Aggregated(state, metrics, given.notes, [*odd, *wrong], given.updates, answered, idle)

    def _changes(self, given: RoundUpdates) -> list[Change]:
        counts = [update.weight for update in given.updates]
        if self.cap is not None:
            middle = median_low([count for count in counts if count > 0] or counts)
            counts = [min(count, self.cap * middle) for count in counts]
        return [
            Change(replace(update, weight=1.0), task, share, self.lr * self.factor(_age(given, update)))
            for update, task, share in zip(given.updates, given.tasks, normalised(counts), strict=True)
        ]


def _age(given: RoundUpdates, update: Update) -> int:
    """τ, the number of versions that an update is behind; 0 where nobody knows its version."""
    return 0 if update.version is None else given.state.round - update.version
