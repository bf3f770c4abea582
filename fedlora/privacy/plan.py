"""What follows from the settings of a private run: σ for the whole of it, and each round's mechanism."""

import functools
import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedlora.errors import ConfigError
from fedlora.privacy.ledger import ORDERS, Accountant, Entry, Ledger, Unit, epsilon
from fedlora.privacy.random import Source

if TYPE_CHECKING:
    from fedlora.privacy.optimizer import PrivateOptimizer
    from fedlora.privacy.settings import Privacy

TRIES, CLOSE, AIM = 6, 0.985, 0.993  # of the search for σ: at most so many, until so close, by aiming so
SLOPE = 1.3  # epsilon goes about as σ to the minus this


@dataclass(frozen=True)
class Plan:
    """The way of one client, or of the server, through a private run.

    Args:
        privacy: the settings.
        batch_size: expected number of records of a batch or of clients of a round; sums are divided by it.
        steps: releases of a round.
        delta: at which epsilon is read.
        sigma: standard deviation of the noise over the clip, for the whole run.
        q: probability with which a record is in a batch, or a client in a round.
        unit: what the ledger protects; None for the unit of the settings.
    """

    privacy: "Privacy"
    batch_size: int
    steps: int
    delta: float
    sigma: float
    q: float
    unit: Unit | None = None

    def after(self, spent: Ledger | None) -> Ledger:
        """The ledger after one more round."""
        privacy = self.privacy
        before = spent or Ledger(self.delta, unit=self.unit or privacy.unit)
        before = replace(before, delta=self.delta, accountant=privacy.accountant)
        return before.plus(Entry(self.sigma, self.q, self.steps), privacy.valid)

    def refusal(self, spent: Ledger | None) -> str | None:
        """Why there must not be another round; None if there may."""
        then, budget = self.after(spent).epsilon, self.privacy.epsilon
        if then <= budget:
            return None
        if self.privacy.hides_counts:  # the numbers would tell how many records there are
            return "the privacy budget is spent"
        now = 0.0 if spent is None else spent.epsilon
        return (
            f"the privacy budget is spent: epsilon is {now:.3f} of {budget:g} at delta {self.delta:g}, one "
            f"more round would make it {then:.3f}"
        )

    def mechanism(self, client: int, round: int) -> "Mechanism":
        """What releases one round of a client, or of the server (client -1); draws its batches too."""
        seed = self.privacy.insecure_test_seed
        source = Source(None if seed is None else f"{seed} {client} {round}")
        return Mechanism(self.sigma, self.privacy.clip, self.batch_size, source)


@dataclass(frozen=True)
class Mechanism:
    """How sums are released: clip, noise, and where random numbers come from.

    Args:
        sigma: standard deviation of the noise over the clip.
        clip: largest norm of a record's gradient, or of a client's change, over all that is trained.
        batch_size: expected size of a batch, by which the sum is divided.
        source: of the noise and the batches; one client's alone.
    """

    sigma: float
    clip: float
    batch_size: int
    source: Source

    def wrap(self, optimizer: torch.optim.Optimizer) -> "PrivateOptimizer":
        """The optimizer whose gradients come out of this mechanism."""
        from fedlora.privacy.optimizer import PrivateOptimizer  # Opacus is slow to import

        return PrivateOptimizer(optimizer, self)


@functools.lru_cache(maxsize=4096)
def calibrate(target: float, delta: float, q: float, steps: int, accountant: Accountant = "prv") -> float:
    """The σ with which so many steps spend at most the target, by the ledger's own account.

    Raises:
        ConfigError: no noise is enough.
    """
    from opacus.accountants.utils import get_noise_multiplier

    def spent(sigma: float) -> float:
        return epsilon((Entry(sigma, q, steps),), delta, accountant)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in the ledger
            high = float(
                get_noise_multiplier(
                    target_epsilon=target,
                    target_delta=delta,
                    sample_rate=q,
                    steps=steps,
                    accountant="rdp",
                    epsilon_tolerance=min(0.01, target / 100),
                    alphas=ORDERS,
                )
            )
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"privacy: no noise gives epsilon {target:g} at delta {delta:g} over {steps} steps of a share "
            f"{q:.3g} of the records; raise epsilon or delta, or train fewer rounds"
        ) from error
    while (reached := spent(high)) > target:
        high *= 1.01
    low, slope = 0.0, SLOPE  # a σ that is too small, and how epsilon goes with σ
    for _ in range(TRIES):  # that bound was quick and wide; by the ledger's own less noise will do
        if reached >= CLOSE * target:
            break
        sigma = max(high * (reached / (AIM * target)) ** (1 / slope), low + (high - low) / 4, high / 2)
        found = spent(sigma)
        if found > reached:
            slope = max(0.5, math.log(found / reached) / math.log(high / sigma))
        if found <= target:
            high, reached = sigma, found
        else:
            low = sigma
    return high
