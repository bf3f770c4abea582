"""The settings of private training, and what follows from them for one client: q, σ, its budget."""

import functools
import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedlora.errors import ConfigError
from fedlora.privacy.ledger import ORDERS, Accountant, Entry, Ledger, epsilon
from fedlora.privacy.random import Source

if TYPE_CHECKING:
    from fedlora.privacy.optimizer import PrivateOptimizer

LARGEST = 1000.0  # an epsilon beyond this protects nothing, and its σ is beneath what accountants resolve
TRIES, CLOSE, AIM = 6, 0.985, 0.993  # of the search for σ: at most so many, until so close, by aiming so
SLOPE = 1.3  # epsilon goes about as σ to the minus this


@dataclass(frozen=True)
class DPSGD:
    """Differential privacy of each record of a client, against whoever sees what the client sends.

    Abadi et al. "Deep Learning with Differential Privacy". CCS 2016. https://arxiv.org/abs/1607.00133
    Every step takes each record with probability q, clips each record's gradient over all that is trained to
    `clip`, sums, adds normal noise of σ times the clip, and divides by the expected size of a batch. σ is
    such that a client which takes part `participations` times has spent at most `epsilon`; then it stops.

    Args:
        epsilon: of the whole run, for each client.
        delta: below 1 / rows; None takes min(1e-5, 1 / (10 rows)) for each client.
        clip: largest norm of a record's gradient.
        participations: rounds that a client takes part in at most.
        public_counts: whether a client's number of records may be known. Then it weighs in the mean, and q,
            σ, steps and the epsilon spent so far, from which it follows, are reported; else only the budget.
        accountant: "prv", or "rdp", which is quicker where every client has another number of rows.
        insecure_test_seed: repeatable noise for tests; every output then says that epsilon is not valid.
    """

    epsilon: float = 8.0
    delta: float | None = None
    clip: float = 1.0
    participations: int = 1
    public_counts: bool = True
    accountant: Accountant = "prv"
    insecure_test_seed: int | None = None

    def __post_init__(self) -> None:
        for name, top in (("epsilon", LARGEST), ("delta", 1.0), ("clip", math.inf)):
            value = getattr(self, name)
            if value is None and name == "delta":
                continue
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < top):
                raise ConfigError(f"privacy.{name}: expected a number between 0 and {top:g}, got {value!r}")
        if not (isinstance(self.participations, int) and self.participations >= 1):
            raise ConfigError(
                f"privacy.participations: expected a whole number of at least 1, got {self.participations!r}"
            )
        if self.accountant not in ("prv", "rdp"):
            raise ConfigError(f"privacy.accountant: expected prv or rdp, got '{self.accountant}'")
        for name in ("public_counts",):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"privacy.{name}: expected true or false, got {getattr(self, name)!r}")

    @property
    def valid(self) -> bool:
        """Whether the noise is random, so that epsilon means something."""
        return self.insecure_test_seed is None

    def plan(self, rows: int, batch_size: int, steps: int) -> "Plan":
        """What follows for a client.

        Args:
            rows: its records.
            batch_size: expected size of a batch.
            steps: of a round.

        Raises:
            ConfigError: fewer records than a batch, a delta that allows giving a record away, or an epsilon
                that no noise reaches.
        """
        if rows < batch_size:
            raise ConfigError(
                f"privacy: a client has {rows} records, expected at least client.batch_size={batch_size}; "
                "lower it, or raise data.min_rows"
            )
        delta = min(1e-5, 1 / (10 * rows)) if self.delta is None else self.delta
        if delta >= 1 / rows:
            raise ConfigError(
                f"privacy.delta: expected less than 1/{rows}, since a client has {rows} records and one of "
                f"them could be given away; got {delta:g}"
            )
        q, total = batch_size / rows, self.participations * steps
        sigma = calibrate(self.epsilon, delta, q, total, self.accountant)
        return Plan(self, batch_size, steps, delta, sigma, q)


@dataclass(frozen=True)
class Plan:
    """One client's way through a private run.

    Args:
        privacy: the settings.
        batch_size: expected size of a batch, by which sums are divided.
        steps: of a round.
        delta: the client's.
        sigma: standard deviation of the noise over the clip, for the whole run.
        q: probability with which a record is in a batch.
    """

    privacy: DPSGD
    batch_size: int
    steps: int
    delta: float
    sigma: float
    q: float

    def after(self, spent: Ledger | None) -> Ledger:
        """The ledger after one more round."""
        before = replace(spent or Ledger(self.delta), delta=self.delta, accountant=self.privacy.accountant)
        return before.plus(Entry(self.sigma, self.q, self.steps), self.privacy.valid)

    def refusal(self, spent: Ledger | None) -> str | None:
        """Why the client must not train another round; None if it may."""
        then, budget = self.after(spent).epsilon, self.privacy.epsilon
        if then <= budget:
            return None
        now = 0.0 if spent is None else spent.epsilon
        return (
            f"its privacy budget is spent: epsilon is {now:.3f} of {budget:g} at delta {self.delta:g}, one "
            f"more round would make it {then:.3f}"
        )

    def mechanism(self, client: int, round: int) -> "Mechanism":
        """What releases one round of a client; draws its batches too."""
        seed = self.privacy.insecure_test_seed
        source = Source(None if seed is None else f"{seed} {client} {round}")
        return Mechanism(self.sigma, self.privacy.clip, self.batch_size, source)

    def told(self, spent: Ledger) -> dict[str, float]:
        """What a client reports of its privacy; numbers that depend on nothing that is to be protected."""
        known = {"delta": self.delta, "epsilon_valid": float(spent.valid)}
        if not self.privacy.public_counts:  # what is spent so far says how many steps, and so how many rows
            delta = self.privacy.delta
            return known | {"epsilon": self.privacy.epsilon, "delta": 1e-5 if delta is None else delta}
        return known | {
            "epsilon": spent.epsilon,
            "sigma": self.sigma,
            "q": self.q,
            "steps": float(self.steps),
        }


@dataclass(frozen=True)
class Mechanism:
    """How one client's steps are released: clip, noise, and where its random numbers come from.

    Args:
        sigma: standard deviation of the noise over the clip.
        clip: largest norm of a record's gradient, over all that is trained.
        batch_size: expected size of a batch.
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
