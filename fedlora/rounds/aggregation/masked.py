"""Aggregation under masks that cancel in the sum: the server sees nothing of an update but the sum."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.serverapp import Grid

from fedlora.compression import RandK
from fedlora.compression.topk import kept
from fedlora.core.messages import Task
from fedlora.core.update_step import RoundUpdates
from fedlora.core.vectors import form
from fedlora.errors import IncompatibleUpdates
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation.base import Aggregated, Aggregation, Delivery, aggregate_mean, choose
from fedlora.rounds.aggregation.tree import TreeDelivery
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.tree import Tree
from fedlora.secure_aggregation.masked_round import SecureSum


@dataclass(frozen=True)
class MaskedAggregation(Aggregation):
    """The strategy is shown the mean of a secure sum, with client-level privacy a noised one.

    Args:
        mechanism: of client-level privacy; None without it.
        uniform: whether clients count alike, instead of by their numbers of examples; a mechanism has a rule
            of its own for this.
        codec: of the updates, at places that all clients of a round share; None where they travel whole.
        seed: the run's.
        tree: edges that add up masked vectors on their way; None for none.
    """

    mechanism: ClientLevelMechanism | None = None
    uniform: bool = False
    codec: RandK | None = None
    seed: int = 0
    tree: Tree | None = None

    @property
    def shows_losses(self) -> bool:
        """True unless whole clients are protected."""
        return self.mechanism is None

    def refusal(self) -> str | None:
        """Why no further round may change the state: the budget is spent. None without one."""
        return self.mechanism.refusal() if self.mechanism else None

    def least(self, needed: int) -> int:
        """What the settings ask for; under client-level privacy the masks alone decide what is known."""
        return 0 if self.mechanism else needed

    def sample(
        self, there: Sequence[int], busy: Collection[int], round: int, config: RoundConfig
    ) -> list[int]:
        """As in plain rounds; under client-level privacy the members are fixed first, and busy ones are out.

        A busy client counts as one that fails: if another took its place, its own slowness would move the sum
        by more than one client.
        """
        if self.mechanism is None:
            return super().sample(there, busy, round, config)
        members = choose(there, config.enough(len(there)), config.seed, round)
        return self.mechanism.sample([node for node in members if node not in busy], round)

    def open(self, grid: Grid, nodes: Sequence[int], round: int, wide: Callable[[], Task]) -> Delivery:
        """Let the clients agree on masks; those that do not are out of the round."""
        terms = self.mechanism.terms if self.mechanism else {"uniform": self.uniform}
        whole = wide()
        places = None
        if self.codec is not None:
            sizes = [math.prod(shape) for shape in form(whole).values()]
            places = (self.seed, round, kept(self.codec.density, sizes))
        secure = SecureSum(grid, nodes, round, whole, places=places, **terms)
        return TreeDelivery(secure, self.tree) if self.tree else secure

    def aggregate(self, given: RoundUpdates, delivery: Delivery, rng: np.random.Generator) -> Aggregated:
        """Unmask the sum, add noise where there is a mechanism, and show the strategy the mean.

        Raises:
            IncompatibleUpdates: the sum is not known. Nothing is released or paid for then.
        """
        add, secure = None, delivery
        if isinstance(delivery, TreeDelivery):
            add, secure = delivery.added, delivery.inner
        if not isinstance(secure, SecureSum):
            raise IncompatibleUpdates("there is no sum, since the clients did not agree on masks")
        if self.mechanism is None:
            return aggregate_mean(given, secure.mean(add), rng)
        wide = given.wide
        mean = self.mechanism.release(given.strategy, wide, secure.total(add))
        return aggregate_mean(given, mean, rng)
