"""What a client has spent: every (σ, q, steps), and the epsilon that all of it comes to.

A step releases the sum of clipped gradients of a Poisson batch, in which each record is with probability q,
with Gaussian noise of σ times the clip. Steps compose in any order, so equal ones are kept as a count.
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
    "record": "add or remove one record of a client, whose number of records is known",
    "client": "add or remove one client with all its records; how many there are is known",
    "contribution": "replace all updates of one client by zeros; who takes part, and who fails, is known",
}
MECHANISM = "Gaussian noise on Poisson samples"

Accountant = Literal["prv", "rdp"]
# Beyond these the PRV accountant takes minutes and gigabytes; the Rényi bound holds as well, and is wider.
LARGEST_RENYI, MOST_ENTRIES, MOST_STEPS = 50.0, 8, 20_000
ORDERS = (*range(2, 17), 20, 24, 32, 48, 63, 128, 256, 512)  # whole ones are quick

Step = tuple[float, float, int]


@dataclass(frozen=True, order=True)
class Entry:
    """Steps of one kind.

    Args:
        sigma: standard deviation of the noise over the clip.
        q: probability with which a record is in a batch.
        steps: how many; empty batches count.
    """

    sigma: float
    q: float
    steps: int

    def __post_init__(self) -> None:
        if not (self.sigma >= 0 and 0 < self.q <= 1 and isinstance(self.steps, int) and self.steps >= 0):
            raise ConfigError(f"a ledger's entry needs sigma >= 0, 0 < q <= 1 and whole steps, got {self}")


@dataclass(frozen=True)
class Ledger:
    """All that one client, or for client-level privacy the server, has spent in a run. It only ever grows.

    Args:
        delta: at which epsilon is read.
        entries: what was spent, equal kinds merged.
        accountant: "prv" takes the smaller of the Rényi and the PRV bound, where PRV is safe; "rdp" Rényi.
        valid: whether all noise was random; a test seed makes epsilon a number without a meaning, for good.
        unit: what is protected.
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
        """The epsilon of all entries together, at the ledger's delta; 0 for none."""
        return epsilon(self.entries, self.delta, self.accountant)

    def covers(self, older: "Ledger") -> bool:
        """Whether nothing that an older state of this ledger holds is missing."""
        steps = {(e.sigma, e.q): e.steps for e in self.entries}
        kept = all(steps.get((e.sigma, e.q), 0) >= e.steps for e in older.entries)
        return kept and self.valid <= older.valid and self.unit == older.unit

    def record(self) -> dict[str, Any]:
        """All of it with its epsilon and what that means, as plain values."""
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
            CheckpointError: it is damaged; what a client has spent is then unknown, and it must not train.
        """
        try:
            read = json.loads(text)
            entries = _merged(Entry(e["sigma"], e["q"], e["steps"]) for e in read["entries"])
            if read["unit"] not in ADJACENCY or read["mechanism"] != MECHANISM:
                raise ValueError(f"it counts {read['unit']}s under {read['mechanism']}")
            return cls(float(read["delta"]), entries, read["accountant"], bool(read["valid"]), read["unit"])
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"this is no ledger of a client's privacy: {error!r}") from error


@functools.lru_cache(maxsize=4096)
def epsilon(entries: tuple[Entry, ...], delta: float, accountant: Accountant = "prv") -> float:
    """The epsilon at `delta` of all steps together; an upper bound, never an estimate.

    Opacus' Rényi accountant (Mironov, Talwar, Zhang, 2019, arXiv:1908.10530), and its PRV accountant (Gopi,
    Lee, Wutschitz, NeurIPS 2021, arXiv:2106.02848) where that is safe; the smaller holds. Infinite without
    noise.
    """
    history = [(e.sigma, e.q, e.steps) for e in entries if e.steps]
    if not history:
        return 0.0
    if min(sigma for sigma, _, _ in history) <= 0:
        return math.inf
    steps = sum(steps for _, _, steps in history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best Rényi order is the last of those that are tried
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
    """The ledger of the largest epsilon: clients hold different records, so that none has lost more."""
    return max(ledgers, key=lambda ledger: ledger.epsilon, default=None)


def _merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    steps: dict[tuple[float, float], int] = {}
    for e in entries:
        steps[e.sigma, e.q] = steps.get((e.sigma, e.q), 0) + e.steps
    return tuple(sorted(Entry(sigma, q, count) for (sigma, q), count in steps.items() if count))
