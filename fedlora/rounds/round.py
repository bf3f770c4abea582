"""A round in progress, and what the loop needs of a grid that does not wait for everybody."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedlora.rounds.aggregation.base import Delivery


@runtime_checkable
class PatientGrid(Protocol):
    """A grid that goes on while some clients still work on a former round, such as `PollingGrid`.

    Args:
        busy: the nodes of those clients.
        called: gives the name of a node in messages.
    """

    busy: set[int]
    called: Callable[[int], str]


@dataclass(frozen=True)
class Round:
    """One round, from its sampling to its line in metrics.jsonl.

    Args:
        number: from 1.
        delivery: what its clients have agreed on, and how they deliver their updates.
        sampled: how many clients were sampled, including those with whom no agreement was reached.
        away: the names of the clients that are not connected.
        began: when, by time.perf_counter.
        refusal: why the round cannot change the state, whatever replies come; None if it can.
    """

    number: int
    delivery: Delivery
    sampled: int
    away: Sequence[str]
    began: float
    refusal: str | None = None

    @property
    def nodes(self) -> list[int]:
        """The nodes that are to be sent a task, in the order of their clients' ids."""
        return self.delivery.nodes
