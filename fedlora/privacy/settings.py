"""The settings of private training, of records and of clients."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.errors import ConfigError
from fedlora.privacy.ledger import Accountant, Ledger, Unit
from fedlora.privacy.plan import Plan, calibrate

# Where float32 holds a clipped gradient. Far below, its numbers are rounded up to the smallest that float32
# has, and squares vanish from its norm; far above, they are infinite. A record would then be over the clip.
CLIPS = (1e-9, 1e9)
LARGEST = 1000.0  # an epsilon beyond this protects nothing, and its σ is beneath what accountants resolve


@dataclass(frozen=True)
class Privacy:
    """What both levels have in common.

    Args:
        epsilon: of the whole run.
        delta: below one over the number of what is protected; None takes min(1e-5, a tenth of that).
        clip: largest norm of what a single record, or client, adds to a sum, from 1e-9 to 1e9.
        accountant: "prv", or "rdp", which is quicker where every client has another number of rows.
        insecure_test_seed: repeatable noise for tests; every output then says that epsilon is not valid.
    """

    unit: ClassVar[Unit]

    epsilon: float = 8.0
    delta: float | None = None
    clip: float = 1.0
    accountant: Accountant = "prv"
    insecure_test_seed: int | None = None

    def __post_init__(self) -> None:
        for name, top in (("epsilon", LARGEST), ("delta", 1.0)):
            value = getattr(self, name)
            if value is None and name == "delta":
                continue
            if not (_number(value) and 0 < value < top):
                raise ConfigError(f"privacy.{name}: expected a number between 0 and {top:g}, got {value!r}")
        low, high = CLIPS
        if not (_number(self.clip) and low <= self.clip <= high):
            raise ConfigError(f"privacy.clip: expected a number from {low:g} to {high:g}, got {self.clip!r}")
        seed = self.insecure_test_seed
        if seed is not None and type(seed) is not int:
            raise ConfigError(f"privacy.insecure_test_seed: expected a whole number or null, got {seed!r}")
        if self.accountant not in ("prv", "rdp"):
            raise ConfigError(f"privacy.accountant: expected prv or rdp, got '{self.accountant}'")

    @property
    def valid(self) -> bool:
        """Whether the noise is random, so that epsilon means something."""
        return self.insecure_test_seed is None

    @property
    def hides_counts(self) -> bool:
        """Whether nobody may learn how many of what is protected there are, from no message either."""
        return False

    def _whole(self, name: str, none: bool = False) -> None:
        value = getattr(self, name)
        if not (none and value is None) and not (type(value) is int and value >= 1):
            raise ConfigError(f"privacy.{name}: expected a whole number of at least 1, got {value!r}")

    def _delta(self, count: int, whose: str) -> float:
        """At most a tenth of 1/count unless it is said, and below 1/count in any case."""
        delta = min(1e-5, 1 / (10 * count)) if self.delta is None else self.delta
        if delta >= 1 / count:
            n = "n" if self.hides_counts else str(count)
            raise ConfigError(
                f"privacy.delta: expected less than 1/{n}, since {whose} {n} {self.unit}s and one of "
                f"them could be given away; got {delta:g}"
            )
        return delta

    def _plan(self, q: float, total: int, batch_size: int, steps: int, delta: float) -> Plan:
        try:
            sigma = calibrate(self.epsilon, delta, q, total, self.accountant)
        except ConfigError:
            if not self.hides_counts:
                raise
            why = f"privacy: no noise gives epsilon {self.epsilon:g}; raise it, or train fewer rounds"
            raise ConfigError(why) from None
        return Plan(self, batch_size, steps, delta, sigma, q)


@dataclass(frozen=True)
class DPSGD(Privacy):
    """Differential privacy of each record of a client, against whoever sees what the client sends.

    Abadi et al. "Deep Learning with Differential Privacy". CCS 2016. https://arxiv.org/abs/1607.00133
    Every step takes each record with probability q, clips each record's gradient over all that is trained to
    `clip`, sums, adds normal noise of σ times the clip, and divides by the expected size of a batch. σ is
    such that a client which takes part `participations` times has spent at most `epsilon`; then it stops.

    Args:
        participations: rounds that a client takes part in at most; None, all rounds of the run.
        public_counts: whether a client's number of records may be known. Then it weighs in the mean, and q,
            σ, steps and the epsilon spent so far, from which it follows, are reported; else only the budget.
            It is then in no message, but not hidden from whoever measures: σ, and so the noise, follows from
            it, and so does the time of a round where the client's steps do.
        public_metrics: whether a client's training loss and its share of clipped records may be known, which
            no noise covers.
    """

    unit = "record"

    participations: int | None = None
    public_counts: bool = True
    public_metrics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("participations", none=True)
        for name in ("public_counts", "public_metrics"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"privacy.{name}: expected true or false, got {getattr(self, name)!r}")

    @property
    def hides_counts(self) -> bool:
        """Unless a client's number of records may be known."""
        return not self.public_counts

    def plan(self, rows: int, batch_size: int, steps: int) -> Plan:
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
            has = "fewer records" if self.hides_counts else f"{rows} records"
            raise ConfigError(
                f"privacy: a client has {has}, expected at least client.batch_size={batch_size}; "
                "lower it, or raise data.min_rows"
            )
        delta = self._delta(rows, "a client has")
        return self._plan(batch_size / rows, self.planned * steps, batch_size, steps, delta)

    @property
    def planned(self) -> int:
        """For how many rounds of a client the noise is made.

        Raises:
            ConfigError: nobody has said, and this privacy is no part of a run.
        """
        return _said("participations", self.participations)

    def for_rounds(self, rounds: int) -> "DPSGD":
        """The same, for so many rounds where it names no number of its own."""
        return self if self.participations is not None else replace(self, participations=rounds)

    def told(self, plan: Plan, spent: Ledger) -> dict[str, float]:
        """What a client reports of its privacy; numbers that depend on nothing that is to be protected."""
        known = {"delta": plan.delta, "epsilon_valid": float(spent.valid)}
        if not self.public_counts:  # what is spent so far says how many steps, and so how many rows
            delta = self.delta
            return known | {"epsilon": self.epsilon, "delta": 1e-5 if delta is None else delta}
        return known | {
            "epsilon": spent.epsilon,
            "sigma": plan.sigma,
            "q": plan.q,
            "steps": float(plan.steps),
        }


@dataclass(frozen=True)
class ClientLevel(Privacy):
    """Differential privacy of each client as a whole, against whoever sees the models but not the updates.

    McMahan, Ramage, Talwar, Zhang. "Learning Differentially Private Recurrent Language Models". ICLR 2018.
    https://arxiv.org/abs/1710.06963. A round takes each of N clients with probability q by itself; the server
    clips what each has changed to `clip`, sums with weights of at most 1, adds normal noise of σ times the
    clip, and divides by q N, whoever answered. σ is such that all rounds together spend at most `epsilon`.

    Args:
        rounds: for how many the noise is made; None, for those of the run.
        example_cap: a client of n examples counts min(n / example_cap, 1); None counts all alike. It is
            chosen without a look at the clients' data.
    """

    unit = "client"

    rounds: int | None = None
    example_cap: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("rounds", none=True)
        self._whole("example_cap", none=True)

    def plan(self, clients: int, sampled: int, masked: bool = False) -> Plan:
        """What follows for the server.

        Args:
            clients: N, how many there are.
            sampled: how many a round takes: on the average of a Poisson sample, or exactly under masks.
            masked: whether the clients send under masks. The members of a masked round are known, so nothing
                is gained by sampling (q = 1), and what is protected are a client's updates, not its presence.

        Raises:
            ConfigError: a delta that allows giving a client away, or an epsilon that no noise reaches.
        """
        sampled = min(sampled, clients)
        delta = self._delta(clients, "there are")
        if masked:
            return replace(self._plan(1.0, self.planned, sampled, 1, delta), unit="contribution")
        return self._plan(sampled / clients, self.planned, sampled, 1, delta)

    @property
    def planned(self) -> int:
        """For how many rounds the noise is made.

        Raises:
            ConfigError: nobody has said, and this privacy is no part of a run.
        """
        return _said("rounds", self.rounds)

    def for_rounds(self, rounds: int) -> "ClientLevel":
        """The same, for so many rounds where it names no number of its own."""
        return self if self.rounds is not None else replace(self, rounds=rounds)

    def weight(self, examples: float) -> float:
        """What a client of so many examples counts, from 0 to 1."""
        return 1.0 if self.example_cap is None else min(max(examples, 0.0) / self.example_cap, 1.0)


def _said(name: str, rounds: int | None) -> int:
    if rounds is None:
        raise ConfigError(f"privacy.{name}: expected the number of rounds that the noise is for, got none")
    return rounds


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
