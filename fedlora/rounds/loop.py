"""The server side of a run: one class on Flower's Strategy, around a pure fedlora strategy.

It samples, sends, checks what comes back, lets the strategy combine it, evaluates, records and checkpoints.
Which engine carries the messages is the Grid's business.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlora.callbacks.console import Display
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.engines.polling import PollingGrid
from fedlora.errors import ConfigError, FedLoraError, IncompatibleUpdates
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.robust.base import Robust, Screened
from fedlora.rounds.aggregation_error import sizes
from fedlora.rounds.codec import metrics_of, read_update, write_task
from fedlora.rounds.exchange import MessageExchange, line_of
from fedlora.rounds.pending import PendingMessages
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.sanity_checks import check_state, check_updates
from fedlora.rounds.totals import totals
from fedlora.secure_aggregation.masked_round import SecureSum
from fedlora.seeds import generator
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog

Evaluate = Callable[[Sequence[Task]], list[tuple[float, float]]]
Named = Callable[[float, float], dict[str, float]]


class ServerLoop(FlowerStrategy):
    """A run of one strategy over the clients behind a Grid.

    Args:
        strategy: the algorithm.
        state: where to start.
        roster: who takes part.
        rules: sampling, weights, evaluation.
        evaluate: loss and share of right answers of tasks' adapters, as they are, on the server's test rows.
        named: from those two to the metrics of what is trained for.
        folder: where every round is recorded.
        progress: what the user sees.
        done: how many rounds were finished before (a resumed run).
        spent: from the clients' lines of a round to what privacy has cost so far, for the round's own line:
            "epsilon" and what belongs to it.
        central: client-level privacy; it samples, and the strategy then sees no update but its noised mean.
        robust: a rule between the updates and the strategy.
        recording: keeps what the strategy is given.
    """

    def __init__(
        self,
        strategy: Strategy,
        state: State,
        roster: ClientRegistry,
        rules: RoundConfig,
        evaluate: Evaluate,
        named: Named,
        folder: RunFolder,
        progress: Display,
        done: int = 0,
        spent: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = lambda lines: {},
        central: ClientLevelMechanism | None = None,
        robust: Robust | None = None,
        recording: UpdateLog | None = None,
    ) -> None:
        self.strategy, self.state = strategy, state
        self._roster, self._rules, self._evaluate, self._named = roster, rules, evaluate, named
        self._folder, self._progress, self._done, self._spent = folder, progress, done, spent
        self._central, self._robust, self._recording = central, robust, recording
        self._sum: SecureSum | None = None  # of the round that goes on
        self._least = rules.min_updates  # good updates that the round needs
        self._away = list[str]()  # what those are called that were not there when the round began
        self._over: str | None = None  # why no round may change the state any more
        self._inbox = MessageExchange(progress.warn, rules.timeout)
        self._began = time.perf_counter()

    def run(self, grid: Grid) -> None:
        """Run the rounds that are left."""
        for _ in self.rounds(grid):
            pass

    def rounds(self, grid: Grid) -> Iterator[dict[str, Any]]:
        """Run the rounds that are left; the line of each when it has finished."""
        logging.getLogger("flwr").setLevel(logging.WARNING)  # the run has its own display
        if isinstance(grid, PollingGrid):
            grid.called = self._roster.called
        there = self._roster.gather(grid, self._rules.clients, self._rules.wait)
        if self._roster.refused and len(there) < self._rules.clients and not self._done:
            raise FedLoraError(
                f"{len(there)} of {self._rules.clients} clients can take part, and "
                f"{', '.join(map(self._roster.called, sorted(self._roster.refused)))} cannot, for the reason "
                f"above; mend it there, or begin without with clients={len(there)}"
            )
        left = self._rules.rounds - self._done
        for number in range(1, left + 1):
            messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            replies = grid.send_and_receive(messages, timeout=self._rules.timeout)
            self.aggregate_train(number, replies)
            yield self._line

    def last_look(self, grid: Grid) -> dict[int, dict[str, float]]:
        """Every client's evaluation of its own model after the last round, where the rules ask for it."""
        if not self._rules.evaluate_clients:
            return {}
        found, asked = dict[int, dict[str, float]](), PendingMessages()
        questions = (asked.note(message) for message in self._questions(self._roster.gather(grid)))
        for reply in grid.send_and_receive(questions, timeout=self._rules.timeout):
            if (node := asked.node(reply)) is None or self._peers[node].id in found:
                continue
            if reply.has_error() or "metrics" not in reply.content.metric_records:
                why = reply.error.reason if reply.has_error() else "its reply has no metrics"
                self._progress.warn(f"{self._peers[node].called} could not evaluate its model: {why}")
                continue
            found[self._peers[node].id] = metrics_of(dict(reply.content.metric_records["metrics"]))
        return dict(sorted(found.items()))

    def _questions(self, nodes: Iterable[int]) -> Iterable[Message]:
        for node in nodes:
            task = self.strategy.task(self.state, self._peers[node])
            content = write_task(task, self._rules.rounds + 1, self._rules.seed)[0]
            yield Message(content, node, "evaluate", ttl=self._rules.timeout)

    @property
    def _peers(self) -> Mapping[int, Peer]:
        return self._roster.peers

    def summary(self) -> None:
        """Nothing: the run's own display says it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and write each its own task, when the grid asks for it."""
        self._began, self._sum = time.perf_counter(), None
        round = server_round + self._done
        self._over = self._central.refusal() if self._central else None
        sampled = [] if self._over else self._sample(grid, round)
        self._least = self._rules.least(len(sampled))
        self._progress.begin(round, self._rules.enough(len(sampled)))
        if self._rules.secure_sum and not self._over:
            sampled = self._agree(grid, sampled, round)
        return self._tasks(sampled, round)

    def _tasks(self, nodes: Sequence[int], round: int) -> Iterable[Message]:
        for node in nodes:
            peer = self._peers[node]
            task = self.strategy.task(self.state, peer)
            more = self._sum.records(node) if self._sum else {}
            yield self._inbox.send(node, peer, task, round, self._rules.seed, self.state.round, more)

    def _agree(self, grid: Grid, nodes: Sequence[int], round: int) -> list[int]:
        """Let the clients of a round agree on masks; those that did, and none if they are too few."""
        terms = self._central.terms if self._central else {"uniform": self._rules.weights == "uniform"}
        wide = self.strategy.task(self.state, self._roster.widest)
        try:
            self._sum = SecureSum(grid, nodes, round, wide, **terms)
        except (ConfigError, IncompatibleUpdates) as error:
            self._progress.warn(f"round {round}: {error}")
            return []
        return self._sum.nodes

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, combine the good ones, and record the round."""
        round = server_round + self._done
        read = self._sum.read if self._sum else read_update
        updates, tasks, lines = self._inbox.receive(round, replies, read)
        metrics = self._combine(round, updates, tasks, lines)
        if self._sum:
            self._sum.count(round, self._peers, lines, self._progress.warn)
        if self._rules.evaluate_updates and updates:
            alone = self._evaluate(
                [replace(t, adapter=u.adapter) for u, t in zip(updates, tasks, strict=True)]
            )
            by_client = {u.peer.id: self._named(*m) for u, m in zip(updates, alone, strict=True) if u.peer}
            for line in lines:
                found = by_client.get(line["client"], {})
                line |= {f"test_{name}": value for name, value in found.items()}
        every = self._rules.evaluate_every
        if every and (round % every == 0 or round == self._rules.rounds) and not self.strategy.personal:
            metrics |= self._named(*self._evaluate([Task(self.state.adapter, fold=self.state.fold)])[0])
        if self._roster.apart:
            metrics["away"] = self._away
            gone = {"status": "away", "reason": "not connected when the round began"}
            lines += [line_of(round, peer, 0, 0) | gone for peer in self._roster.missing()]
            lines.sort(key=lambda line: int(line["client"]))
        named = self._named if self.strategy.personal else None  # the clients' own models are the result
        seconds = time.perf_counter() - self._began
        metrics = totals(round, lines, metrics, seconds, not self._central, named)
        metrics |= self._spent(lines)
        self._folder.finish_round(round, self.state, metrics, lines)
        self._progress.end(metrics)
        self._line = metrics
        return ArrayRecord(), None

    def _combine(
        self, round: int, updates: list[Update], tasks: list[Task], lines: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Let the strategy make the next state; what there is to say of it, and of clients in their lines."""
        rng = generator(self._rules.seed, "aggregate", 0, round)
        least = max(self._least, self._robust.least if self._robust else 0)
        if self._over or (len(updates) < least and not self._central):
            few = f"{len(updates)} good updates, {least} needed"
            self._progress.warn(f"round {round}: {self._over or few}; the state stays as it was")
            return {}
        try:
            if self._central or self._rules.secure_sum:
                self.state = self.strategy.aggregate(self.state, [self._mean(updates, tasks)], rng)
                return {**self.state.metrics, **sizes(self.state)}
            return self._combine_each(round, updates, tasks, lines, rng)
        except IncompatibleUpdates as error:  # no client's message ends a run
            self._progress.warn(f"round {round}: {error}; the state stays as it was")
            return {}

    def _combine_each(
        self,
        round: int,
        updates: list[Update],
        tasks: list[Task],
        lines: list[dict[str, Any]],
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """The same where the server sees every update."""
        before = self.state
        if self._rules.weights == "uniform":
            updates = [replace(update, weight=1.0) for update in updates]
        odd, kept = [*check_updates(updates, tasks)], Screened(updates, tasks)
        if self._robust:
            kept = self._robust.screen(self.strategy, before, updates, tasks, self._roster.widest)
        for line in lines:
            line |= kept.notes.get(line["client"], {})
        self.state = self.strategy.aggregate(before, kept.updates, rng)
        if self._recording:
            self._recording.write(round, before, kept.updates)
        numbers, wrong = check_state(self.strategy, before, self.state, kept.updates, kept.tasks)
        for text in [*odd, *wrong]:
            self._progress.warn(f"round {round}: {text}")
        return {**self.state.metrics, **kept.metrics, **numbers}

    def _mean(self, updates: list[Update], tasks: list[Task]) -> Update:
        """The one update that the strategy is shown; how far it is from the clients' is not known.

        Raises:
            IncompatibleUpdates: the sum under masks is not known. Nothing is released or paid for then.
        """
        if self._rules.secure_sum and self._sum is None:
            raise IncompatibleUpdates("there is no sum, since the clients did not agree on masks")
        if self._central is None:
            assert self._sum is not None
            return self._sum.mean()
        wide = self.strategy.task(self.state, self._roster.widest)
        if self._sum:
            return self._central.release(self.strategy, wide, self._sum.total())
        total = self._central.total(self.strategy, wide, updates, tasks)
        return self._central.release(self.strategy, wide, total)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No second message: a client evaluates what it is sent before it trains."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to combine."""
        list(replies)
        return None

    def _sample(self, grid: Grid, round: int) -> list[int]:
        """This round's nodes, in the order of their clients' ids."""
        rules, busy = self._rules, grid.busy if isinstance(grid, PollingGrid) else set()
        there = self._roster.gather(grid, rules.least(rules.sampled(rules.clients)), rules.wait)
        self._away = self._roster.away(rules.clients)
        if self._away:
            who, some = ", ".join(self._away), len(there)
            self._progress.warn(
                f"round {round}: {who} away, {some} of {some + len(self._away)} clients are there"
            )
        free = [node for node in there if node not in busy]
        if self._central is None:
            return self._chosen(free, rules.sampled(len(free)), round)
        if not rules.secure_sum:
            return self._central.sample(free, round)
        # A busy client counts as one that fails: if another took its place, its own slowness would move the
        # sum by more than one client.
        members = self._chosen(there, rules.enough(len(there)), round)
        return self._central.sample([node for node in members if node not in busy], round)

    def _chosen(self, nodes: list[int], count: int, round: int) -> list[int]:
        """So many of the nodes, by the run's seed."""
        if count == len(nodes):
            return nodes
        chosen = generator(self._rules.seed, "sample", 0, round).choice(len(nodes), count, replace=False)
        return [nodes[i] for i in sorted(chosen)]
