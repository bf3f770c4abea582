"""The server side of a run: the steps of a round, around a pure strategy.

A round samples clients, sends tasks, checks what comes back, lets the strategy combine it, evaluates, records
and checkpoints. The scheduler decides when each of these happens; the Grid decides which engine carries the
messages.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.callbacks.base import Callbacks, RunHandle
from fedlora.core.messages import State, Task
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import RoundUpdates
from fedlora.errors import ConfigError, FedLoraError, IncompatibleUpdates
from fedlora.rounds.aggregation.base import Aggregation, Delivery
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.codec import metrics_of, write_task
from fedlora.rounds.exchange import MessageExchange, Received, line_of
from fedlora.rounds.pending import PendingMessages
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round import PatientGrid, Round
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.rounds.totals import totals
from fedlora.seeds import generator
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog

Evaluate = Callable[[Sequence[Task]], list[tuple[float, float]]]
Named = Callable[[float, float], dict[str, float]]


class ServerLoop:
    """A run of one strategy over the clients behind a Grid.

    Whoever starts a run calls `rounds` or `run`. A scheduler puts `begin_round`, `messages` or `message`, and
    `finish_round` in order, until `finished`.

    Args:
        strategy: the algorithm.
        run: the state to start from, how many rounds are done, and the callbacks that watch the rest.
        registry: the clients that take part.
        config: sampling, weights, evaluation.
        evaluate: gives the loss and the share of right answers of each task's adapter on the test rows.
        named: turns those two numbers into the metrics of the learning task.
        folder: where every round is recorded; None for nowhere.
        spent: gives, from the clients' lines of a round, the privacy spent so far ("epsilon" and its details)
            for the round's own line.
        aggregation: how the next state follows from a round's replies; None takes what `config` asks for.
        recording: records the updates that the strategy is given; None for no recording.
        scheduler: when tasks are sent, and when updates are aggregated.
        score: what clients call the score of their own models (`LearningTask.score`).
    """

    def __init__(
        self,
        strategy: Strategy,
        run: RunHandle,
        registry: ClientRegistry,
        config: RoundConfig,
        evaluate: Evaluate,
        named: Named,
        folder: RunFolder | None = None,
        spent: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = lambda lines: {},
        aggregation: Aggregation | None = None,
        recording: UpdateLog | None = None,
        scheduler: Scheduler = Synchronous(),  # noqa: B008 (it has no state)
        score: str = "accuracy",
    ) -> None:
        self.strategy, self.config, self._run = strategy, config, run
        self._registry, self._evaluate, self._named = registry, evaluate, named
        self._folder, self._spent, self._scheduler = folder, spent, scheduler
        self._callbacks = Callbacks(run)
        self._aggregation = aggregation or aggregation_for(config)
        self._recording, self._score = recording, score
        self._exchange = MessageExchange(run.warn, config.seed, config.timeout)

    @property
    def state(self) -> State:
        """The state after the rounds that are done."""
        assert self._run.state is not None, "a server has a state"
        return self._run.state

    @property
    def done(self) -> int:
        """How many rounds are finished."""
        return self._run.done

    @property
    def finished(self) -> bool:
        """Whether no round is left, or a callback has stopped the run."""
        return self.done >= self.config.rounds or self._run.stopped is not None

    def run(self, grid: Grid) -> None:
        """Run the rounds that are left."""
        for _ in self.rounds(grid):
            pass

    def rounds(self, grid: Grid) -> Iterator[dict[str, Any]]:
        """Run the rounds that are left, one whenever the next line is asked for.

        Yields:
            The line of metrics.jsonl of each round, once it is recorded.

        Raises:
            FedLoraError: there are too few clients to begin with.
        """
        logging.getLogger("flwr").setLevel(logging.WARNING)  # the run has its own display
        if isinstance(grid, PatientGrid):
            grid.called = self._registry.called
        there = self._registry.gather(grid, self.config.clients, self.config.wait)
        if self._registry.refused and len(there) < self.config.clients and not self.done:
            who = ", ".join(map(self._registry.called, sorted(self._registry.refused)))
            raise FedLoraError(
                f"{len(there)} of {self.config.clients} clients can take part, and {who} cannot, for the "
                f"reason above; mend it there, or begin without with clients={len(there)}"
            )
        yield from self._scheduler.rounds(self, grid)

    def begin_round(self, grid: Grid) -> Round:
        """Begin the next round: sample its clients, and let them agree on what they need to deliver."""
        began, number = time.perf_counter(), self.done + 1
        refusal = self._aggregation.refusal()
        nodes, away = ([], []) if refusal else self._sample(grid, number)
        self._callbacks.round_begin(number, self.config.enough(len(nodes)))
        delivery = Delivery([]) if refusal else self._open(grid, nodes, number)
        return Round(number, delivery, len(nodes), away, began, refusal)

    def messages(self, round: Round) -> Iterator[Message]:
        """The tasks of a round's clients, each written when it is asked for, so that few are in memory."""
        peers = self._registry.peers
        return round.delivery.sent((peers[node], self.message(round, node)) for node in round.nodes)

    def message(self, round: Round, node: int) -> Message:
        """The task of one client, from the state as it is now."""
        peer = self._registry.peers[node]
        task = self.strategy.task(self.state, peer)
        more = round.delivery.records(node)
        return self._exchange.message(node, peer, task, round.number, self.state.round, more)

    def finish_round(
        self, round: Round, replies: Iterable[Message], keep_waiting: bool = False
    ) -> dict[str, Any]:
        """Check the replies, combine the good ones, and record the round.

        Args:
            round: what `begin_round` returned.
            replies: those that have come, to this round's messages or to earlier ones.
            keep_waiting: whether clients that have not answered may still do so in a later round; else they
                count as dropped.

        Returns:
            The round's line of metrics.jsonl.
        """
        received = self._exchange.receive(round.number, replies, round.delivery.read, keep_waiting)
        lines = received.lines
        state, metrics = self._aggregate(round, received)
        round.delivery.count(round.number, self._registry.peers, lines, self._run.warn)
        metrics |= round.delivery.traffic()
        if self.config.evaluate_updates and received.updates:
            self._evaluate_updates(received)
        every = self.config.evaluate_every
        due = every and (round.number % every == 0 or round.number == self.config.rounds)
        if due and not self.strategy.personal:
            metrics |= self._named(*self._evaluate([Task(state.adapter, base_delta=state.base_delta)])[0])
        if self._registry.apart:
            metrics["away"] = list(round.away)
            gone = {"status": "away", "reason": "not connected when the round began"}
            lines += [line_of(round.number, peer, 0, 0) | gone for peer in self._registry.missing()]
            lines.sort(key=lambda line: int(line["client"]))
        named = self._named if self.strategy.personal else None  # the clients' own models are the result
        seconds = time.perf_counter() - round.began
        shown = self._aggregation.shows_losses
        line = totals(round.number, lines, metrics, seconds, shown, named, self._score)
        line |= self._spent(lines)
        if self._folder:
            self._folder.finish_round(round.number, state, line, lines)
        self._callbacks.round_end(line, lines, state)
        return line

    def evaluate_clients(self, grid: Grid) -> dict[int, dict[str, float]]:
        """The metrics of each client's own model on the rows that the client keeps back, by client id.

        The models are those of the run's result. The mapping is empty unless `config.evaluate_clients` is
        set.
        """
        if not self.config.evaluate_clients:
            return {}
        found, asked = dict[int, dict[str, float]](), PendingMessages()
        peers = self._registry.peers
        questions = (asked.note(message) for message in self._questions(self._registry.gather(grid)))
        for reply in grid.send_and_receive(questions, timeout=self.config.timeout):
            if (node := asked.node(reply)) is None or peers[node].id in found:
                continue
            if reply.has_error() or "metrics" not in reply.content.metric_records:
                why = reply.error.reason if reply.has_error() else "its reply has no metrics"
                self._run.warn(f"{peers[node].called} could not evaluate its model: {why}")
                continue
            found[peers[node].id] = metrics_of(dict(reply.content.metric_records["metrics"]))
        return dict(sorted(found.items()))

    def _questions(self, nodes: Iterable[int]) -> Iterator[Message]:
        for node in nodes:
            task = self.strategy.task(self._run.result, self._registry.peers[node])
            content = write_task(task, self.config.rounds + 1, self.config.seed)[0]
            yield Message(content, node, "evaluate", ttl=self.config.timeout)

    def _sample(self, grid: Grid, round: int) -> tuple[list[int], list[str]]:
        """This round's nodes, in the order of their clients' ids, and the names of the clients away."""
        config, registry = self.config, self._registry
        there = registry.gather(grid, config.least(config.sampled(config.clients)), config.wait)
        if away := registry.away(config.clients):
            some = len(there)
            self._run.warn(
                f"round {round}: {', '.join(away)} away, {some} of {some + len(away)} clients are there"
            )
        busy = self._exchange.waiting | (grid.busy if isinstance(grid, PatientGrid) else set())
        return self._aggregation.sample(there, busy, round, config), away

    def _open(self, grid: Grid, nodes: list[int], round: int) -> Delivery:
        """Let the clients of a round agree on what they need; no node is left if they could not."""
        wide = lambda: self.strategy.task(self.state, self._registry.widest)  # noqa: E731
        try:
            return self._aggregation.open(grid, nodes, round, wide)
        except (ConfigError, IncompatibleUpdates) as error:
            self._run.warn(f"round {round}: {error}")
            return Delivery([])

    def _aggregate(self, round: Round, received: Received) -> tuple[State, dict[str, Any]]:
        """The next state and its metrics; a note on a client's update goes into the client's line."""
        number, updates = round.number, received.updates
        least = self._aggregation.least(self.config.least(round.sampled))
        if round.refusal or len(updates) < least:
            few = f"{len(updates)} good updates, {least} needed"
            self._run.warn(f"round {number}: {round.refusal or few}; the state stays as it was")
            return self.state, {}
        before, rng = self.state, generator(self.config.seed, "aggregate", 0, number)
        given = RoundUpdates(self.strategy, before, updates, received.tasks, self._registry.widest)
        try:
            found = self._aggregation.aggregate(given, round.delivery, rng)
        except IncompatibleUpdates as error:  # no client's message ends a run
            self._run.warn(f"round {number}: {error}; the state stays as it was")
            return before, {}
        for line in received.lines:
            line |= found.notes.get(line["client"], {})
        if self._recording and found.combined:
            self._recording.write(number, before, found.combined)
        for text in found.warnings:
            self._run.warn(f"round {number}: {text}")
        return found.state, dict(found.metrics)

    def _evaluate_updates(self, received: Received) -> None:
        """Evaluate each client's update by itself, and put the metrics into the client's line."""
        both = zip(received.updates, received.tasks, strict=True)
        alone = self._evaluate([replace(task, adapter=update.adapter) for update, task in both])
        found = {u.peer.id: self._named(*m) for u, m in zip(received.updates, alone, strict=True) if u.peer}
        for line in received.lines:
            own = found.get(line["client"], {})
            line |= {f"test_{name}": value for name, value in own.items()}
