"""The privacy ledger: which noisy steps were released, and the epsilon that they compose to.

A step is one Poisson-subsampled Gaussian mechanism: it includes each record (or client) with probability q,
independently of the others, and releases the sum of the clipped contributions with Gaussian noise of standard
deviation σ · clip. The order of steps does not matter to the bound, so equal steps are stored as a count.
"""

import functools
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedlora.errors import CheckpointError, ConfigError

Unit = Literal["record", "client", "contribution"]
ADJACENCY: dict[Unit, str] = {
    "record": (
        "neighbouring datasets differ by adding or removing one record of one client; "
        "the number of that client's records is public"
    ),
    "client": (
        "neighbouring datasets differ by adding or removing one client with all of its records; "
        "the number of clients is public"
    ),
    "contribution": (
        "neighbouring datasets differ by replacing all updates of one client by zeros; "
        "who takes part and who fails is public"
    ),
}
MECHANISM = "Gaussian noise on Poisson samples"

Accountant = Literal["prv", "rdp"]
# Beyond these the PRV accountant takes minutes and gigabytes. The Rényi bound holds too, but is looser.
LARGEST_RENYI, MOST_ENTRIES, MOST_STEPS = 50.0, 8, 20_000
ORDERS = (*range(2, 17), 20, 24, 32, 48, 63, 128, 256, 512)  # integer orders are fast to compute

Step = tuple[float, float, int]


@dataclass(frozen=True, order=True)
class Entry:
    """A number of equal steps.

    Args:
        sigma: noise multiplier, the standard deviation of the noise divided by the clip; at least 0.
        q: sampling rate, the probability with which a record is in a batch; above 0 and at most 1.
        steps: number of steps; a step with an empty batch counts, too.

    Raises:
        ConfigError: a value is outside of its range.
    """

    sigma: float
    q: float
    steps: int

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and 0 < self.q <= 1 and isinstance(self.steps, int) and self.steps >= 0):
            raise ConfigError(
                f"a ledger's entry: expected sigma >= 0, 0 < q <= 1 and whole steps, got {self}"
            )


@dataclass(frozen=True)
class Ledger:
    """All steps that one client, or under client-level privacy the server, has released in a run.

    A ledger only grows: no step is ever removed from it.

    Args:
        delta: the δ at which epsilon is computed.
        entries: the released steps; equal ones are merged.
        accountant: "rdp" uses the Rényi bound; "prv" the smaller of the Rényi and the PRV bound.
        valid: whether all noise was random. After a step with `insecure_test_seed` it stays False.
        unit: what one dataset of a neighbouring pair has and the other lacks; see `ADJACENCY`.
    """

    delta: float
    entries: tuple[Entry, ...] = ()
    accountant: Accountant = "prv"
    valid: bool = True
    unit: Unit = "record"

    def plus(self, entry: Entry, valid: bool = True) -> "Ledger":
        """The ledger after more steps."""
        merged = _merged([*self.entries, entry])
        return replace(self, entries=merged, valid=self.valid and valid)

    @property
    def epsilon(self) -> float:
        """The epsilon that all entries compose to at the ledger's delta; 0 without entries."""
        return epsilon(self.entries, self.delta, self.accountant)

    def covers(self, older: "Ledger") -> bool:
        """Whether this ledger contains every step of an older state of it."""
        steps = {(e.sigma, e.q): e.steps for e in self.entries}
        kept = all(steps.get((e.sigma, e.q), 0) >= e.steps for e in older.entries)
        return kept and self.valid <= older.valid and self.unit == older.unit

    def record(self) -> dict[str, Any]:
        """The ledger, its epsilon, and the definition of what epsilon bounds, as values for JSON."""
        spent = self.epsilon
        return {
            "epsilon": spent if math.isfinite(spent) else None,
            "delta": self.delta,
            "valid": self.valid,
            "unit": self.unit,
            "adjacency": ADJACENCY[self.unit],
            "mechanism": MECHANISM,
            "accountant": self.accountant,
            "entries": [{"sigma": e.sigma, "q": e.q, "steps": e.steps} for e in self.entries],
        }

    def dump(self) -> str:
        """One JSON object."""
        return json.dumps(self.record())

    @classmethod
    def load(cls, text: str) -> "Ledger":
        """The ledger that `dump` wrote.

        Raises:
            CheckpointError: the text is damaged. What the client has spent is then unknown, so it must not
                train.
        """
        try:
            read = json.loads(text)
            entries = _merged(Entry(e["sigma"], e["q"], e["steps"]) for e in read["entries"])
            if read["unit"] not in ADJACENCY or read["mechanism"] != MECHANISM:
                raise ValueError(f"unknown unit {read['unit']!r} or mechanism {read['mechanism']!r}")
            return cls(float(read["delta"]), entries, read["accountant"], bool(read["valid"]), read["unit"])
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"this is no ledger of differential privacy: {error!r}") from error


@functools.lru_cache(maxsize=4096)
def epsilon(entries: tuple[Entry, ...], delta: float, accountant: Accountant = "prv") -> float:
    """An upper bound on the epsilon at `delta` that all steps compose to; infinite for a step without noise.

    It is computed by Opacus' Rényi accountant (Mironov, Talwar, Zhang, 2019, arXiv:1908.10530). With "prv" it
    is the smaller of that and of Opacus' PRV accountant (Gopi, Lee, Wutschitz, NeurIPS 2021,
    arXiv:2106.02848), where the latter is numerically safe.
    """
    history = [(e.sigma, e.q, e.steps) for e in entries if e.steps]
    if not history:
        return 0.0
    if min(sigma for sigma, _, _ in history) <= 0:
        return math.inf
    steps = sum(steps for _, _, steps in history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns if the best Rényi order is the largest that it tried
        if accountant == "prv" and len(history) <= MOST_ENTRIES and steps <= MOST_STEPS:
            rough = _renyi(history, delta, ORDERS)
            if rough <= LARGEST_RENYI and (tight := _prv(history, delta)) is not None:
                return min(rough, tight)
        return min(_renyi(history, delta), _renyi(history, delta, ORDERS))


def _renyi(history: list[Step], delta: float, orders: Sequence[float] | None = None) -> float:
    from opacus.accountants import RDPAccountant  # slow to import, and only needed here

    found = RDPAccountant()
    found.history = list(history)
    try:
        bound = float(found.get_epsilon(delta, alphas=orders))
    except (OverflowError, ValueError, ZeroDivisionError):
        return math.inf
    return math.inf if math.isnan(bound) else bound


def _prv(history: list[Step], delta: float) -> float | None:
    from opacus.accountants import PRVAccountant

    found = PRVAccountant()
    found.history = list(history)
    try:
        bound = float(found.get_epsilon(delta))
    except (OverflowError, ValueError, ZeroDivisionError, RuntimeError, MemoryError):
        return None
    return bound if 0 < bound < math.inf else None


def worst(ledgers: Iterable[Ledger]) -> Ledger | None:
    """The ledger with the largest epsilon, or None; it bounds all, since clients hold disjoint records."""
    return max(ledgers, key=lambda ledger: ledger.epsilon, default=None)


def _merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    steps: dict[tuple[float, float], int] = {}
    for e in entries:
        steps[e.sigma, e.q] = steps.get((e.sigma, e.q), 0) + e.steps
    return tuple(sorted(Entry(sigma, q, count) for (sigma, q), count in steps.items() if count))
