"""The interface of what changes clients' updates on their way from the training to a strategy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.seeds import generator


@dataclass(frozen=True)
class ClientUpdate:
    """One client's update on its way from the training to the message. There are no rows in it.

    Args:
        client: the client's id.
        round: the round, from 1.
        seed: the run's.
        task: what the client was sent.
        start: the adapter from which it trained: the task's, with the client's own parts where it keeps any.
        adapter: what training gave, or what the step before has made of it. Of this, what the task shares is
            sent, and nothing else.
        weight: the number of examples that the client will say it has.
        memory: name -> tensor that this step kept when the client last trained in this run; empty the first
            time. It stays on the client's own disk.
    """

    client: int
    round: int
    seed: int
    task: Task
    start: Adapter
    adapter: Adapter
    weight: float
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def change(self) -> dict[str, Tensor]:
        """The name of each shared tensor -> the adapter's minus the one it started from; float64.

        A tensor has the shape that it has in `adapter`: a rule may have cut it to a smaller rank.
        """
        now = dict(self.adapter.tensors())
        return {name: now[name].double() - old.double() for name, old in self._begun().items()}

    def moved(
        self, change: Mapping[str, Tensor], memory: Mapping[str, Tensor] | None = None
    ) -> "ClientUpdate":
        """The same with another change: each named tensor becomes the one it started from plus this.

        Args:
            change: name -> change, of the shapes that `change` has.
            memory: as for `become`.
        """
        begun, now = self._begun(), dict(self.adapter.tensors())
        moved = {name: (begun[name].double() + by).to(now[name].dtype) for name, by in change.items()}
        return self.become(self.adapter.with_tensors(moved), memory)

    def become(self, adapter: Adapter, memory: Mapping[str, Tensor] | None = None) -> "ClientUpdate":
        """The same update with another adapter.

        Args:
            adapter: what the next step is given, or what is sent; in the shapes, precisions and scales of
                this one.
            memory: what this step keeps until the client trains again; None or nothing
                changes nothing.
        """
        return replace(self, adapter=adapter, memory=memory or self.memory)

    def generator(self, purpose: str) -> np.random.Generator:
        """Random numbers of this client in this round; the same ones for the same purpose, wherever it runs.

        Args:
            purpose: what they are for; two steps that draw for different purposes draw independently.
        """
        return generator(self.seed, purpose, self.client, self.round)

    def _begun(self) -> dict[str, Tensor]:
        """The shared tensors that the client started from, each as far as it still reaches."""
        start, now = dict(self.start.tensors()), dict(self.adapter.tensors())
        return {n: start[n][tuple(slice(0, k) for k in now[n].shape)] for n in self.task.shared()}


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


class UpdateStep:
    """One step between a client's training and the strategy, such as a bound, a code or a filter.

    A step has a half at the client, a half at the server, or both. A run has a list of steps, which is read
    from the training to the message. Clients apply their halves in its order, to what training gave and
    before anything is written or masked. The server applies its halves in the reverse order, and a robust
    rule last. So the code that a client applies last is undone first, and at the server a step sees updates
    from which the codes of all later steps have been removed.

    Subclasses are frozen dataclasses of their settings, and both halves are pure: the result depends on the
    arguments and on the fields alone. A subclass overrides at least one half.

    Masks are not a step. They need messages of their own before and after the training, and they make one
    vector of fixed-point numbers instead of an adapter, which has to be clipped right before it is rounded.
    `fedlora.secure_aggregation.masked_round` applies both to what the last client half returns.
    """

    @property
    def least(self) -> int:
        """With fewer updates than this the step cannot work, and the round leaves the state as it was."""
        return 1

    @property
    def at_client(self) -> bool:
        """Whether it has a half at the client."""
        return type(self).on_client is not UpdateStep.on_client

    @property
    def at_server(self) -> bool:
        """Whether it has a half at the server."""
        return type(self).on_server is not UpdateStep.on_server

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        """What the next step is given in the place of this update, or what is sent; by default it stays.

        `given.become(adapter)` or `given.moved(change)` makes it. Under privacy of records this may only do
        what can be done without the rows, which makes it post-processing.

        Args:
            given: the update, who sends it, and where it started.
        """
        return given

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        """What the next step, or the strategy, is given in the place of these updates; by default they stay.

        `given.become(updates, ...)` makes it.

        Args:
            given: the updates, at least `least` of them.

        Raises:
            IncompatibleUpdates: nothing can be made of them. The round then leaves the state as it was.
        """
        return given
