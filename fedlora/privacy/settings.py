"""The settings of differential privacy: of single records (`DPSGD`), of whole clients (`ClientLevel`)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.errors import ConfigError
from fedlora.privacy.ledger import Accountant, Ledger, Unit
from fedlora.privacy.plan import Plan, calibrate
from fedlora.ranges import check_number, check_whole

# The range in which float32 represents a clipped gradient. Far below it, numbers are rounded to the smallest
# that float32 has and their squares vanish from the norm; far above it, they are infinite. Both would break
# the clip.
CLIPS = (1e-9, 1e9)
LARGEST = 1000.0  # a larger epsilon is no protection, and accountants cannot resolve its σ


@dataclass(frozen=True)
class Privacy:
    """The settings that both levels share. n is a client's number of records, or the number of clients.

    Args:
        epsilon: the budget for the whole run, above 0 and below 1000.
        delta: the δ of the guarantee, below 1 / n; None takes min(1e-5, 1 / (10 n)).
        clip: upper bound on the L2 norm of what one record, or one client, adds to a sum, from 1e-9 to 1e9.
        accountant: "prv", or "rdp", which is faster where all clients have different numbers of records.
        insecure_test_seed: makes the noise repeatable, for tests. Every output then says that epsilon is not
            valid.

    Raises:
        ConfigError: a value is outside of its range.
    """

    unit: ClassVar[Unit]

    epsilon: float = 8.0
    delta: float | None = None
    clip: float = 1.0
    accountant: Accountant = "prv"
    insecure_test_seed: int | None = None

    def __post_init__(self) -> None:
        check_number("privacy.epsilon", self.epsilon, above=0, below=LARGEST)
        check_number("privacy.delta", self.delta, above=0, below=1, none=True)
        check_number("privacy.clip", self.clip, least=CLIPS[0], most=CLIPS[1])
        seed = self.insecure_test_seed
        if seed is not None and type(seed) is not int:
            raise ConfigError(f"privacy.insecure_test_seed: expected a whole number or null, got {seed!r}")
        if self.accountant not in ("prv", "rdp"):
            raise ConfigError(f"privacy.accountant: expected prv or rdp, got '{self.accountant}'")

    @property
    def valid(self) -> bool:
        """Whether the noise is random; epsilon is a guarantee only then."""
        return self.insecure_test_seed is None

    @property
    def hides_counts(self) -> bool:
        """Whether the number of records, or of clients, must not appear in any message."""
        return False

    def _delta(self, count: int, whose: str) -> float:
        """The configured delta, or min(1e-5, 1 / (10 count)); refused unless it is below 1 / count."""
        delta = min(1e-5, 1 / (10 * count)) if self.delta is None else self.delta
        if delta >= 1 / count:
            n = "n" if self.hides_counts else str(count)
            raise ConfigError(
                f"privacy.delta: expected less than 1/{n}, since {whose} {n} {self.unit}s and a larger delta "
                f"permits to publish one of them; got {delta:g}"
            )
        return delta

    def _plan(self, q: float, total: int, batch_size: int, steps: int, delta: float) -> Plan:
        try:
            sigma = calibrate(self.epsilon, delta, q, total, self.accountant)
        except ConfigError:
            if not self.hides_counts:
                raise
            why = f"privacy: no noise gives epsilon {self.epsilon:g}; raise epsilon, or train fewer rounds"
            raise ConfigError(why) from None
        return Plan(self, batch_size, steps, delta, sigma, q)


@dataclass(frozen=True)
class DPSGD(Privacy):
    """Record-level differential privacy, against everyone who sees what a client sends, the server included.

    Abadi et al. "Deep Learning with Differential Privacy". CCS 2016. https://arxiv.org/abs/1607.00133
    Neighbouring datasets differ by adding or removing one record of one client. Each training step samples
    each record with probability q, clips each record's gradient over all trained parameters to the norm
    `clip`, sums the gradients, adds Gaussian noise of standard deviation σ · clip, and divides by the
    expected batch size. σ is chosen such that a client that takes part in `participations` rounds spends at
    most `epsilon`. A client whose budget is spent takes no further part.

    Args:
        participations: the largest number of rounds in which a client takes part; None takes all rounds.
        public_counts: whether a client's number of records is public. If so, it is the client's weight in the
            mean, and q, σ, the steps and the epsilon spent so far are reported. Otherwise all weights are
            equal and only the budget is reported. The number then is in no message, but an observer can still
            infer it from the strength of the noise, and from the duration of a round unless `client.steps` is
            set.
        public_metrics: whether a client reports its training loss and its share of clipped records. No noise
            is added to either.
    """

    unit = "record"

    participations: int | None = None
    public_counts: bool = True
    public_metrics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("privacy.participations", self.participations, none=True)
        for name in ("public_counts", "public_metrics"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"privacy.{name}: expected true or false, got {getattr(self, name)!r}")

    @property
    def hides_counts(self) -> bool:
        """True unless a client's number of records is public."""
        return not self.public_counts

    def plan(self, rows: int, batch_size: int, steps: int) -> Plan:
        """The plan of one client: q = batch_size / rows, and the σ for the whole run.

        Args:
            rows: the client's number of records.
            batch_size: expected number of records in a batch.
            steps: training steps in a round.

        Raises:
            ConfigError: there are fewer records than a batch has, delta is at least 1 / rows, or no σ reaches
                epsilon.
        """
        if rows < batch_size:
            has = "fewer records" if self.hides_counts else f"{rows} records"
            raise ConfigError(
                f"privacy: a client has {has}, expected at least those of a step, {batch_size}; "
                "lower client.batch_size or client.accumulate, or raise data.min_rows"
            )
        delta = self._delta(rows, "a client has")
        return self._plan(batch_size / rows, self.planned * steps, batch_size, steps, delta)

    @property
    def planned(self) -> int:
        """The number of rounds of a client for which σ is chosen.

        Raises:
            ConfigError: neither the setting nor a run gives the number.
        """
        return _said("participations", self.participations)

    def for_rounds(self, rounds: int) -> "DPSGD":
        """The same settings, with this number of rounds where they give none."""
        return self if self.participations is not None else replace(self, participations=rounds)

    def report(self, plan: Plan, spent: Ledger) -> dict[str, float]:
        """What a client reports of its privacy; it depends on the settings and on public counts only."""
        known = {"delta": plan.delta, "epsilon_valid": float(spent.valid)}
        if not self.public_counts:  # the epsilon spent so far tells the steps, and so the number of rows
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
    """Client-level differential privacy, against everyone who sees the global models but not the updates.

    McMahan, Ramage, Talwar, Zhang. "Learning Differentially Private Recurrent Language Models". ICLR 2018.
    https://arxiv.org/abs/1710.06963. Neighbouring datasets differ by adding or removing one client with all
    of its records. A round samples each of the N clients with probability q, independently. The server clips
    the change of each sampled client to the norm `clip`, sums the changes with weights of at most 1, adds
    Gaussian noise of standard deviation σ · clip, and divides by the constant q N, however many clients
    answered. σ is chosen such that all rounds together spend at most `epsilon`.

    Args:
        rounds: the number of rounds for which σ is chosen; None takes those of the run.
        example_cap: a client with n examples has the weight min(n / example_cap, 1); None gives all clients
            the weight 1. The value must be chosen without looking at the clients' data.
    """

    unit = "client"

    rounds: int | None = None
    example_cap: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("privacy.rounds", self.rounds, none=True)
        check_whole("privacy.example_cap", self.example_cap, none=True)

    def plan(self, clients: int, sampled: int, masked: bool = False) -> Plan:
        """The plan of the server: q = sampled / clients, and the σ for the whole run.

        Args:
            clients: N, the number of clients.
            sampled: clients in a round: the expected number of a Poisson sample, or the exact number under
                secure aggregation.
            masked: whether the clients use secure aggregation. The members of such a round are public, so
                sampling does not amplify privacy (q = 1), and the unit is a client's contribution: its
                updates are protected, its presence is not.

        Raises:
            ConfigError: delta is at least 1 / clients, or no σ reaches epsilon.
        """
        sampled = min(sampled, clients)
        delta = self._delta(clients, "there are")
        if masked:
            return replace(self._plan(1.0, self.planned, sampled, 1, delta), unit="contribution")
        return self._plan(sampled / clients, self.planned, sampled, 1, delta)

    @property
    def planned(self) -> int:
        """The number of rounds for which σ is chosen.

        Raises:
            ConfigError: neither the setting nor a run gives the number.
        """
        return _said("rounds", self.rounds)

    def for_rounds(self, rounds: int) -> "ClientLevel":
        """The same settings, with this number of rounds where they give none."""
        return self if self.rounds is not None else replace(self, rounds=rounds)

    def weight(self, examples: float) -> float:
        """The weight of a client with so many examples, from 0 to 1."""
        return 1.0 if self.example_cap is None else min(max(examples, 0.0) / self.example_cap, 1.0)


def _said(name: str, rounds: int | None) -> int:
    if rounds is None:
        raise ConfigError(
            f"privacy.{name}: expected the number of rounds for which sigma is chosen, got none"
        )
    return rounds
