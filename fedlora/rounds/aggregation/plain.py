"""Aggregation where the server sees every update, with a list of steps between updates and strategy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.core.strategy import next_state
from fedlora.core.update_step import RoundUpdates, UpdateStep
from fedlora.rounds.aggregation.base import Aggregated, Aggregation, Delivery
from fedlora.rounds.sanity_checks import check_state, check_updates


@dataclass(frozen=True)
class PlainAggregation(Aggregation):
    """Each step changes the clients' updates, and then the strategy combines them.

    Args:
        steps: in their order at the clients; so the last of them is applied first here, and a robust rule,
            which stands before all others, is applied last.
        uniform: whether clients count alike, instead of by their numbers of examples.
        sparse: whether updates hold a few numbers of each change.
    """

    steps: Sequence[UpdateStep] = ()
    uniform: bool = False
    sparse: bool = False

    def least(self, needed: int) -> int:
        """What the settings ask for, and what every step needs."""
        return max([needed, *(step.least for step in self.steps)])

    def aggregate(self, given: RoundUpdates, delivery: Delivery, rng: np.random.Generator) -> Aggregated:
        """Apply the steps and the strategy, and check the updates and the new state."""
        if self.uniform:
            given = given.become([replace(update, weight=1.0) for update in given.updates])
        coded = [at for at, step in enumerate(self.steps) if step.at_client and step.at_server]
        first = min(coded, default=len(self.steps))
        given = _applied(self.steps[first:], given)
        # Of the updates, not of a step's code for them.
        odd = [*check_updates(given.updates, given.tasks, self.sparse)]
        given = _applied(self.steps[:first], given)
        before = given.state
        state = next_state(given.strategy, before, given.updates, rng)
        numbers, wrong = check_state(given.strategy, before, state, given.updates, given.tasks)
        metrics = {**state.metrics, **given.metrics, **numbers}
        return Aggregated(state, metrics, given.notes, [*odd, *wrong], given.updates)


def _applied(steps: Sequence[UpdateStep], given: RoundUpdates) -> RoundUpdates:
    """A round's updates after the server halves of these steps, of which the last is applied first."""
    for step in reversed(steps):
        given = step.on_server(given)
    return given
