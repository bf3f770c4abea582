"""What the settings of a private run imply: the noise multiplier σ, and the mechanism of a round."""

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

# The search for σ: at most TRIES steps, until epsilon is CLOSE to the target, each aimed at AIM times the
# target.
TRIES, CLOSE, AIM = 6, 0.985, 0.993
SLOPE = 1.3  # first guess: epsilon is proportional to σ to the power of minus this


@dataclass(frozen=True)
class Plan:
    """The parameters with which one client, or the server, takes part in a private run.

    Args:
        privacy: the settings.
        batch_size: expected number of records in a batch, or of clients in a round; sums are divided by it.
        steps: noisy steps in a round.
        delta: the δ at which epsilon is computed.
        sigma: noise multiplier, the standard deviation of the noise divided by the clip; the same in all
            rounds.
        q: sampling rate, the probability with which a record is in a batch, or a client in a round.
        unit: the unit of the ledger; None takes the unit of the settings.
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
        """Why another round would exceed the budget; None if it would not."""
        then, budget = self.after(spent).epsilon, self.privacy.epsilon
        if then <= budget:
            return None
        if self.privacy.hides_counts:  # the numbers would reveal how many records there are
            return "the privacy budget is spent"
        now = 0.0 if spent is None else spent.epsilon
        return (
            f"the privacy budget is spent: epsilon is {now:.3f} of {budget:g} at delta {self.delta:g}, one "
            f"more round would make it {then:.3f}"
        )

    def mechanism(self, client: int, round: int) -> "Mechanism":
        """The mechanism of one round of a client, or of the server (client -1); it also draws the batches."""
        seed = self.privacy.insecure_test_seed
        source = Source(None if seed is None else f"{seed} {client} {round}")
        return Mechanism(self.sigma, self.privacy.clip, self.batch_size, source)


@dataclass(frozen=True)
class Mechanism:
    """A subsampled Gaussian mechanism: its clip, its noise, and its source of random numbers.

    Args:
        sigma: noise multiplier, the standard deviation of the noise divided by the clip.
        clip: largest L2 norm of a record's gradient, or of a client's change, over all trained parameters.
        batch_size: expected size of a batch, by which the sum is divided.
        source: random numbers of the noise and the batches; no other client uses this source.
    """

    sigma: float
    clip: float
    batch_size: int
    source: Source

    def wrap(self, optimizer: torch.optim.Optimizer) -> "PrivateOptimizer":
        """The optimizer, with gradients that this mechanism has clipped and noised."""
        from fedlora.privacy.optimizer import PrivateOptimizer  # Opacus is slow to import

        return PrivateOptimizer(optimizer, self)


@functools.lru_cache(maxsize=4096)
def calibrate(target: float, delta: float, q: float, steps: int, accountant: Accountant = "prv") -> float:
    """A small σ with which so many steps have at most the target epsilon, by `ledger.epsilon`.

    Args:
        target: the epsilon of all steps together.
        delta: the δ at which epsilon is computed.
        q: sampling rate.
        steps: number of steps.
        accountant: "prv" or "rdp".

    Raises:
        ConfigError: no σ reaches the target.
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
            f"privacy: no noise gives epsilon {target:g} at delta {delta:g} over {steps} steps with sampling "
            f"rate {q:.3g}; raise epsilon or delta, or train fewer rounds"
        ) from error
    while (reached := spent(high)) > target:
        high *= 1.01
    low, slope = 0.0, SLOPE  # the largest σ known to be too small, and the exponent of epsilon in σ
    for _ in range(TRIES):  # Opacus' bound is loose; by the ledger's own, less noise suffices
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
