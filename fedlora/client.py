"""The interface of local training: what a client does between a task and its update."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.adapter import Adapter
from fedlora.data import Example
from fedlora.models import Base
from fedlora.protocol import Task


@dataclass(frozen=True)
class Assignment:
    """One client's share of a round: the task it was sent, and its own rows.

    Args:
        client: its id.
        round: the round, from 1.
        seed: the run's seed; with client and round it fixes every random choice.
        task: where to start, what to train.
        rows: the client's training rows.
    """

    client: int
    round: int
    seed: int
    task: Task
    rows: Sequence[Example]


@dataclass(frozen=True)
class Outcome:
    """One client's result: its whole adapter, and numbers to report, "loss" and "steps" among them."""

    adapter: Adapter
    metrics: dict[str, float]


class Client(ABC):
    """A way to train locally. Subclasses are frozen dataclasses; their fields are its hyper-parameters."""

    @abstractmethod
    def train(self, base: Base, assignments: Sequence[Assignment]) -> list[Outcome]:
        """Train every assignment on the one base, with the result that each would have alone."""

    @abstractmethod
    def step_tokens(self, rows: Sequence[Example]) -> int:
        """About how many tokens one local step holds, by which the engine groups clients."""
