"""Rules between the clients' updates and a strategy, so that a few bad clients cannot turn a round.

A rule makes updates out of updates, and the strategy combines those as ever. It looks at what a client
changed of what it was sent, so that clients of different ranks, who start from different cuts, can be held
against one another. Under every rule a number of examples counts no more than the round's median: of n
clients none weighs over 2/n, whatever it says it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low

from fedlora.core.messages import Task, Update
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import RoundUpdates, UpdateStep
from fedlora.errors import ConfigError
from fedlora.privacy import ClientLevel, Privacy
from fedlora.rounds.round_config import RoundConfig


class Robust(UpdateStep, ABC):
    """A robust rule: an update step at the server, which needs every client's own update."""

    @property
    def least(self) -> int:
        """With fewer updates the rule cannot tell good from bad, and the round changes nothing."""
        return 3

    @abstractmethod
    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        """The updates that may count, and in what form; raises as in `UpdateStep`."""

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


def capped(updates: Sequence[Update]) -> list[Update]:
    """The updates with weights of no more than their median, the lower one of two."""
    most = median_low(update.weight for update in updates)
    return [replace(update, weight=min(update.weight, most)) for update in updates]


def averages_both(strategy: Strategy, tasks: Sequence[Task]) -> bool:
    """Whether the strategy may average A by itself and B by itself, so that it matters how ΔW is split."""
    return not strategy.products and all({"A", "B"} <= task.share for task in tasks)
