"""Aggregation under client-level privacy: the strategy is shown the noised mean of clipped changes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.core.update_step import RoundUpdates
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation.base import Aggregated, Aggregation, Delivery, aggregate_mean
from fedlora.rounds.round_config import RoundConfig


@dataclass(frozen=True)
class ClientLevelAggregation(Aggregation):
    """The server sees every update, clips it, and adds noise to the sum before the strategy sees any of it.

    Args:
        mechanism: draws the clients and the noise, and keeps the ledger.
    """

    mechanism: ClientLevelMechanism

    @property
    def shows_losses(self) -> bool:
        """False: the noise does not cover the losses."""
        return False

    def refusal(self) -> str | None:
        """Why no further round may change the state: the budget is spent."""
        return self.mechanism.refusal()

    def least(self, needed: int) -> int:
        """0: how many clients have answered must not decide whether anything is released."""
        return 0

    def sample(
        self, there: Sequence[int], busy: Collection[int], round: int, config: RoundConfig
    ) -> list[int]:
        """Each free node by itself, with the mechanism's probability."""
        return self.mechanism.sample([node for node in there if node not in busy], round)

    def aggregate(self, given: RoundUpdates, delivery: Delivery, rng: np.random.Generator) -> Aggregated:
        """Clip, sum, add noise, and show the strategy the mean."""
        wide = given.wide
        total = self.mechanism.total(given.strategy, wide, given.updates, given.tasks)
        return aggregate_mean(given, self.mechanism.release(given.strategy, wide, total), rng)
