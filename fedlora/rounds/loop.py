"""The server side of a run: the steps of a round, around a pure strategy.

A round samples clients, sends tasks, checks what comes back, lets the strategy combine it, evaluates, records
and checkpoints. The scheduler decides when each of these happens; the Grid decides which engine carries the
messages.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.callbacks.base import Callbacks, RunHandle
from fedlora.compression import Compression
from fedlora.core.messages import State, Task
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import RoundUpdates
from fedlora.errors import ConfigError, FedLoraError, IncompatibleUpdates
from fedlora.rounds.aggregation.base import Aggregation, Delivery
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.evaluations import ask_clients, evaluate_updates
from fedlora.rounds.exchange import MessageExchange, Received, line_of
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round import PatientGrid, Round
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.rule_at_server import RuleAtServer
from fedlora.rounds.scheduling import Scheduler, Synchronous
from fedlora.rounds.server_step import ServerStep
from fedlora.rounds.totals import totals
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.seeds import generator
from fedlora.server_optimizers import ServerOptimizer
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog
from fedlora.training.rules import LocalRule

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
        clock: the virtual time of simulated clients; None where nobody asks for it.
        compression: how the numbers of messages travel; None as they are.
        optimizer: makes the server's step of what a round has changed; None moves by the change itself.
        rule: a local rule that has a half at the server; None without one.
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
        clock: VirtualClock | None = None,
        compression: Compression | None = None,
        optimizer: ServerOptimizer | None = None,
        rule: LocalRule | None = None,
    ) -> None:
        self.strategy, self.config, self._run = strategy, config, run
        self._registry, self._evaluate, self._named = registry, evaluate, named
        self.folder, self._spent, self._scheduler = folder, spent, scheduler
        self._callbacks = Callbacks(run)
        self._aggregation = aggregation or aggregation_for(config)
        self._recording, self._score, self.clock = recording, score, clock
        half = None if rule is None else RuleAtServer(rule, strategy, registry, config.clients)
        self._step = ServerStep(strategy, config.seed, half, optimizer)
        self._exchange = MessageExchange(
            run.warn, config.seed, config.timeout, compression, config.secure_sum
        )

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
        if self.clock and self.folder and self.folder.schedule:
            self.clock.load(self.folder.schedule)
        yield from self._scheduler.rounds(self, grid)

    def client(self, node: int) -> int:
        """The id of the client on a node."""
        return self._registry.peers[node].id

    def client_done(self, count: int) -> None:
        """Tell the callbacks that so many clients have finished."""
        self._callbacks.client_done(count)

    def begin_round(self, grid: Grid, wanted: int | None = None) -> Round:
        """Begin the next round: sample its clients, and let them agree on what they need to deliver.

        Where a scheduler says how many updates are `wanted`, it chooses among the clients itself: the round
        then has all that are there, and no more is asked of them.
        """
        began, number = time.perf_counter(), self.done + 1
        if wanted is not None:
            there, away = self._registry.present(grid, number, wanted, self.config)
            self._callbacks.round_begin(number, wanted)
            return Round(number, Delivery(there), wanted, away, began)
        refusal = self._aggregation.refusal()
        nodes, away = ([], []) if refusal else self._sample(grid, number)
        self._callbacks.round_begin(number, self.config.enough(len(nodes)))
        delivery = Delivery([]) if refusal else self._open(grid, nodes, number)
        return Round(number, delivery, len(nodes), away, began, refusal)

    def messages(self, round: Round) -> Iterator[Message]:
        """The tasks of a round's clients, each written when it is asked for, so that few are in memory."""
        peers = self._registry.peers
        return round.delivery.sent((peers[node], self.message(round, node)) for node in round.nodes)

    def message(self, round: Round, node: int, state: State | None = None) -> Message:
        """The task of one client, from the state as it is now, or as it was in an earlier round."""
        peer, state = self._registry.peers[node], state or self.state
        task = self._step.task(state, peer)
        more = round.delivery.records(node)
        return self._exchange.message(node, peer, task, round.number, state.round, more)

    def late(self, round: Round) -> set[int]:
        """Let virtual time pass until a synchronous round has its replies; the nodes of the others."""
        nodes = {self.client(node): node for node in round.nodes}
        return {nodes[client] for client in self.clock.late(nodes)} if self.clock else set()

    def finish_round(
        self, round: Round, replies: Iterable[Message], keep_waiting: bool = False
    ) -> dict[str, Any]:
        """Check the replies, combine the good ones, and record the round; its line of metrics.jsonl.

        Args:
            round: what `begin_round` returned.
            replies: those that have come, to this round's messages or to earlier ones.
            keep_waiting: whether clients that have not answered may still do so in a later round; else they
                count as dropped.
        """
        schedule = self.clock.dump() if self.clock else ""
        return self.close_round(round, self.receive(round, replies, keep_waiting), schedule)

    def receive(self, round: Round, replies: Iterable[Message], keep_waiting: bool = True) -> Received:
        """Check replies; as `finish_round`, which is told by `close_round` what is to be done with them."""
        return self._exchange.receive(round.number, replies, round.delivery.read, keep_waiting)

    def give_up(self, round: Round, nodes: Iterable[int], why: str) -> Received:
        """Wait no longer for the replies of these nodes, for a reason that their lines give."""
        return Received([], [], self._exchange.give_up(round.number, nodes, why))

    def close_round(
        self, round: Round, received: Received, schedule: str = "", needed: Collection[int] = ()
    ) -> dict[str, Any]:
        """Combine the good updates of a round, and record it; the round's line of metrics.jsonl.

        Args:
            round: what `begin_round` returned.
            received: what `receive` returned.
            schedule: what the scheduler has to know to go on from here.
            needed: the rounds after whose states clients still work.
        """
        lines = received.lines
        state, metrics = self._aggregate(round, received)
        round.delivery.count(round.number, self._registry.peers, lines, self._run.warn)
        metrics |= round.delivery.traffic()
        if self.config.evaluate_updates and received.updates:
            evaluate_updates(received, self._evaluate, self._named)
        every = self.config.evaluate_every
        due = every and (round.number % every == 0 or round.number == self.config.rounds)
        if due and not self.strategy.personal:
            metrics |= self._named(*self._evaluate([Task(state.adapter, base_delta=state.base_delta)])[0])
        if self._registry.apart:
            metrics["away"] = list(round.away)
            gone = {"status": "away", "reason": "not connected when the round began"}
            lines += [line_of(round.number, peer, 0, 0) | gone for peer in self._registry.missing()]
            lines.sort(key=lambda line: int(line["client"]))
        if self.clock:
            metrics["virtual_seconds"] = self.clock.now
        named = self._named if self.strategy.personal else None  # the clients' own models are the result
        seconds = time.perf_counter() - round.began
        shown = self._aggregation.shows_losses
        line = totals(round.number, lines, metrics, seconds, shown, named, self._score)
        line |= self._spent(lines)
        if self.folder:
            self.folder.finish_round(round.number, state, line, lines, schedule, needed)
        self._callbacks.round_end(line, lines, state)
        return line

    def evaluate_clients(self, grid: Grid) -> dict[int, dict[str, float]]:
        """By client id, the metrics of its own model of the result on the rows that it keeps back, if any."""
        if not self.config.evaluate_clients:
            return {}
        task = partial(self._step.task, self._run.result)
        return ask_clients(grid, self._registry, task, self.config, self._run.warn)

    def _sample(self, grid: Grid, round: int) -> tuple[list[int], list[str]]:
        """This round's nodes, in the order of their clients' ids, and the names of the clients away."""
        config = self.config
        least = config.least(config.sampled(config.clients))
        there, away = self._registry.present(grid, round, least, config)
        busy = self._exchange.waiting | (grid.busy if isinstance(grid, PatientGrid) else set())
        if self.clock:
            self.clock.wait_for(map(self.client, there), config.clients_per_round or 1)
            busy |= {node for node in there if self.clock.free(self.client(node)) > self.clock.now}
        return self._aggregation.sample(there, busy, round, config), away

    def _open(self, grid: Grid, nodes: list[int], round: int) -> Delivery:
        """Let the clients of a round agree on what they need; no node is left if they could not."""
        wide = lambda: self._step.task(self.state, self._registry.widest)  # noqa: E731
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
        given = RoundUpdates(
            self.strategy, self._step.shown(before), updates, received.tasks, self._registry.widest
        )
        try:
            found = self._aggregation.aggregate(given, round.delivery, rng)
            state, metrics = self._step.after(before, found, number)
        except IncompatibleUpdates as error:  # no client's message ends a run
            self._run.warn(f"round {number}: {error}; the state stays as it was")
            return before, {}
        for line in received.lines:
            line |= found.notes.get(line["client"], {})
        if self._recording and found.combined:
            self._recording.write(number, before, found.combined)
        for text in found.warnings:
            self._run.warn(f"round {number}: {text}")
        return state, metrics
