"""The interface of what changes clients' updates on their way to a strategy."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy


@dataclass(frozen=True)
class RoundUpdates:
    """The updates of a round on their way to the strategy.

    Args:
        strategy: the algorithm that is to combine them.
        state: the state that it combines them with.
        updates: in the order of their clients' ids.
        tasks: what each update answers to, in the same order.
        widest: a client of the largest ranks that the run can serve; it need not take part.
        notes: client id -> what its line of clients.jsonl says of its update.
        metrics: numbers for the round's line of metrics.jsonl.
    """

    strategy: Strategy
    state: State
    updates: Sequence[Update]
    tasks: Sequence[Task]
    widest: Peer
    notes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def wide(self) -> Task:
        """The task of a client of the largest ranks, in whose form changes of all ranks can be summed."""
        return self.strategy.task(self.state, self.widest)

    def become(
        self,
        updates: Sequence[Update],
        tasks: Sequence[Task] | None = None,
        notes: Mapping[int, Mapping[str, Any]] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> "RoundUpdates":
        """The same round with other updates; notes and metrics are added to those that are there.

        Args:
            updates: what the next step, or the strategy, is given.
            tasks: what each of them answers to; None where those stay as they are.
            notes: client id -> what else its line says.
            metrics: what else the round's line says.
        """
        said = {client: dict(note) for client, note in self.notes.items()}
        for client, note in (notes or {}).items():
            said[client] = {**said.get(client, {}), **note}
        return replace(
            self,
            updates=list(updates),
            tasks=self.tasks if tasks is None else list(tasks),
            notes=said,
            metrics={**self.metrics, **(metrics or {})},
        )


class UpdateStep(ABC):
    """One step between the clients' updates and the strategy, such as a bound or a filter.

    Steps stand in a list and are applied in its order. Subclasses are frozen dataclasses of their settings,
    and pure. This is the server's half, over the list of a round's updates; what a client does to its own
    update before it leaves (the clipping and noise of privacy, masks) is in its own runtime.
    """

    @property
    def least(self) -> int:
        """With fewer updates than this the step cannot work, and the round leaves the state as it was."""
        return 1

    @abstractmethod
    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        """What the next step, or the strategy, is given in the place of these updates.

        `given.become(updates, ...)` makes it.

        Args:
            given: the updates, at least `least` of them.

        Raises:
            IncompatibleUpdates: nothing can be made of them. The round then leaves the state as it was.
        """
