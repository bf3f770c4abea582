"""The interface of local training: what a client does between a task and its update."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, Ledger, Plan
from fedlora.training.evaluation import evaluate
from fedlora.training.rules.base import LocalRule


@dataclass(frozen=True)
class TrainRequest:
    """One client's share of a round: the task it was sent, and its own rows.

    Args:
        client: its id.
        round: the round, from 1.
        seed: the run's seed; with client and round it fixes every random choice.
        task: where to start, what to train.
        rows: the client's training rows.
        memory: what the client kept when it last trained in this run; empty the first time. Own tensors have
            their names, and what a rule remembers stands behind the rule's place in `task.method`: "0/NAME".
        ledger: what the client's privacy has cost so far in this run; None for nothing.
        rounds: how many rounds the federation has, as it was last started; None where nobody has said it.
    """

    client: int
    round: int
    seed: int
    task: Task
    rows: Sequence[Example]
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    ledger: Ledger | None = None
    rounds: int | None = None

    @property
    def start(self) -> Adapter:
        """The task's adapter, with the client's own parts where it has them from before."""
        own = {name: self.memory[name] for name in self.task.own() if name in self.memory}
        return self.task.adapter.with_tensors(own)


@dataclass(frozen=True)
class TrainResult:
    """One client's result.

    Args:
        adapter: its whole adapter.
        metrics: numbers to report, "loss" and "steps" among them.
        memory: what it keeps for the next time, as in `TrainRequest`; never sent.
        ledger: what its privacy has cost, this round included; to be written down before anything is sent.
        examples: the number of rows that it says it has; None for the true one.
        sent: what the task's parts have it send beside the adapter, as `Task.sent` names it.
    """

    adapter: Adapter
    metrics: dict[str, float]
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    ledger: Ledger | None = None
    examples: int | None = None
    sent: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, Tensor]:
        """What is in `memory` of the client itself, without what rules remember."""
        return {n: tensor for n, tensor in self.memory.items() if not n.partition("/")[0].isdigit()}


class Client(ABC):
    """A way to train locally. Subclasses are frozen dataclasses; their fields are its hyper-parameters."""

    @abstractmethod
    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Train every assignment on the one base, with the result that each would have alone."""

    def evaluate(self, base: Base, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        """Loss and share of right answers of each client's model before it trains, on the assignment's rows.

        (nan, nan) where there are no rows.
        """
        tasks = [replace(a.task, adapter=a.start) for a in assignments]
        return evaluate(base, tasks, [a.rows for a in assignments], self.micro_tokens)

    @property
    def micro_tokens(self) -> int | None:
        """Tokens that a micro-batch holds at most, in training and evaluation; None chooses by the rows."""
        return None

    def shared(self, base: Base) -> Mapping[str, tuple[int, int]] | None:
        """The pairs that clients share where those are no part of the model: name -> (d_out, d_in).

        None, the ordinary case: they are the LoRA targets. Asked once, before the first round.

        Raises:
            FedLoraError: the client cannot train on this base.
        """
        return None

    def with_rules(self, rules: Sequence[LocalRule]) -> "Client":
        """This client with more local rules.

        Raises:
            ConfigError: its training follows none.
        """
        names = ", ".join(type(rule).__name__ for rule in rules)
        raise ConfigError(
            f"rule: client {type(self).__name__} trains in steps of its own, which follow no local rule, got "
            f"{names}; use a strategy with client=local, or rule=none"
        )

    def privately(self, privacy: DPSGD) -> "Client":
        """This client under differential privacy of its records.

        Raises:
            ConfigError: it has no way to train so.
        """
        raise ConfigError(
            f"privacy: client {type(self).__name__} cannot train under differential privacy, since its "
            "steps are not sums over single records; use a strategy with client=local, or privacy=none"
        )

    @property
    def other_than_sgd(self) -> str | None:
        """Why its steps are not plain ones, x ← x − lr · g at one constant rate; None where they are."""
        return f"client {type(self).__name__} trains in steps of its own"

    @property
    def private(self) -> bool:
        """Whether it trains under differential privacy, so that nothing else may be told of its rows."""
        return False

    def plan(self, rows: int) -> Plan | None:
        """How privately a client of so many rows trains; None without differential privacy."""
        return None

    def refusal(self, assignment: TrainRequest) -> str | None:
        """Why the client must not train now: that its privacy is spent; None if it may."""
        plan = self.plan(len(assignment.rows))
        return None if plan is None else plan.refusal(assignment.ledger)

    @abstractmethod
    def step_tokens(self, rows: Sequence[Example]) -> int:
        """About how many tokens one local step holds, by which the engine groups clients."""
