"""The server side of a run: one class on Flower's Strategy, around a pure fedlora strategy.

It samples, sends, checks what comes back, lets the strategy combine it, evaluates, records and checkpoints.
Which engine carries the messages is the Grid's business.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlora.adapter import Adapter
from fedlora.algebra import effective_rank, error_and_norm, norm, normalised
from fedlora.engine.folder import RunFolder
from fedlora.engine.progress import Progress
from fedlora.engine.wire import read_update, size, write_task
from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.protocol import Peer, State, Task, Update
from fedlora.seeds import generator
from fedlora.strategy import Strategy

Evaluate = Callable[[Sequence[Adapter]], list[dict[str, float]]]


@dataclass(frozen=True)
class Rules:
    """How a federation is run, whatever the algorithm.

    Args:
        rounds: in all, those before a resume included.
        seed: of sampling, and of all that clients draw.
        clients_per_round: how many are sampled without replacement; None takes all.
        weights: what a client counts, "examples" or "uniform".
        min_updates: with fewer good updates a round ends without changing the state.
        evaluate_every: rounds between evaluations on the server's test rows; 0 never.
        evaluate_updates: whether each client's update is also evaluated by itself on those rows, which shows
            what the client would have reached alone.
    """

    rounds: int
    seed: int
    clients_per_round: int | None = None
    weights: Literal["examples", "uniform"] = "examples"
    min_updates: int = 1
    evaluate_every: int = 1
    evaluate_updates: bool = False

    def __post_init__(self) -> None:
        least = {"rounds": 1, "seed": 0, "clients_per_round": 1, "min_updates": 1, "evaluate_every": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: expected a whole number of at least {low}, got {value}")
        if self.weights not in ("examples", "uniform"):
            raise ConfigError(f"weights: expected examples or uniform, got '{self.weights}'")


class Federation(FlowerStrategy):
    """A run of one strategy over the clients behind a Grid.

    Args:
        strategy: the algorithm.
        state: where to start.
        peer: from a client's id and rank to what the strategy knows of it.
        rules: sampling, weights, evaluation.
        evaluate: metrics of adapters on the server's test rows.
        folder: where every round is recorded.
        progress: what the user sees.
        done: how many rounds were finished before (a resumed run).
    """

    def __init__(
        self,
        strategy: Strategy,
        state: State,
        peer: Callable[[int, int], Peer],
        rules: Rules,
        evaluate: Evaluate,
        folder: RunFolder,
        progress: Progress,
        done: int = 0,
    ) -> None:
        self.strategy, self.state = strategy, state
        self._peer, self._rules, self._evaluate = peer, rules, evaluate
        self._folder, self._progress, self._done = folder, progress, done
        self._peers: dict[int, Peer] = {}
        self._sent: dict[int, tuple[Peer, Task, int]] = {}
        self._began = time.perf_counter()

    def run(self, grid: Grid) -> None:
        """Run the rounds that are left."""
        logging.getLogger("flwr").setLevel(logging.WARNING)  # the run has its own display
        self._meet(grid)
        self.start(grid, ArrayRecord(), num_rounds=self._rules.rounds - self._done)

    def summary(self) -> None:
        """Nothing: the run's own display says it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and write each its own task, when the grid asks for it."""
        self._began = time.perf_counter()
        self._sent.clear()
        round = server_round + self._done
        sampled = self._sample(round)
        self._progress.begin(round, len(sampled))
        for node in sampled:
            peer = self._peers[node]
            task = self.strategy.task(self.state, peer)
            content = write_task(task, round, self._rules.seed)
            self._sent[node] = (peer, task, size(content))
            yield Message(content, node, "train", group_id=str(round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, combine the good ones, and record the round."""
        round = server_round + self._done
        updates, lines = self._receive(round, replies)
        before = self.state
        weights = [1.0 if self._rules.weights == "uniform" else u.weight for u in updates]
        updates = [Update(u.adapter, w, u.peer, u.metrics) for u, w in zip(updates, weights, strict=True)]
        metrics: dict[str, Any] = {}
        if len(updates) >= self._rules.min_updates:
            rng = generator(self._rules.seed, "aggregate", 0, round)
            self.state = self.strategy.aggregate(before, updates, rng)
            metrics = _certificate(self.state, updates)
            if self.state.adapter.digest() == before.adapter.digest():
                self._progress.warn(f"round {round}: the adapter did not move; is anything trained?")
        else:
            self._progress.warn(
                f"round {round}: {len(updates)} good updates, {self._rules.min_updates} needed; "
                "the state stays as it was"
            )
        if self._rules.evaluate_updates and updates:
            alone = self._evaluate([update.adapter for update in updates])
            by_client = {u.peer.id: m for u, m in zip(updates, alone, strict=True) if u.peer}
            for line in lines:
                found = by_client.get(line["client"], {})
                line |= {f"test_{name}": value for name, value in found.items()}
        every = self._rules.evaluate_every
        if every and (round % every == 0 or round == self._rules.rounds):
            metrics |= self._evaluate([self.state.adapter])[0]
        metrics = self._totals(round, lines, metrics)
        self._folder.finish_round(round, self.state, metrics, lines)
        self._progress.end(metrics)
        return ArrayRecord(), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No second message: a client evaluates what it is sent before it trains."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to combine."""
        list(replies)
        return None

    def _meet(self, grid: Grid) -> None:
        """Ask every node once which client it is, and of what rank."""
        questions = [Message(RecordDict(), node, "query.profile") for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(questions):
            if reply.has_error():
                self._progress.warn(f"a node cannot take part: {reply.error.reason}")
                continue
            profile = reply.content.config_records["profile"]
            peer = self._peer(int(profile["client"]), int(profile["rank"]))  # type: ignore[arg-type]
            self._peers[reply.metadata.src_node_id] = peer

    def _sample(self, round: int) -> list[int]:
        """This round's nodes, in the order of their clients' ids."""
        nodes = sorted(self._peers, key=lambda node: self._peers[node].id)
        wanted = self._rules.clients_per_round
        if wanted is None or wanted >= len(nodes):
            return nodes
        chosen = generator(self._rules.seed, "sample", 0, round).choice(len(nodes), wanted, replace=False)
        return [nodes[i] for i in sorted(chosen)]

    def _receive(self, round: int, replies: Iterable[Message]) -> tuple[list[Update], list[dict[str, Any]]]:
        """The good updates in the order of clients, and one line for the log a client, good or not."""
        updates: list[Update] = []
        lines: list[dict[str, Any]] = []
        for reply in replies:
            # A client may reply once a round, and only to what it was sent.
            sent = self._sent.pop(reply.metadata.src_node_id, None)
            if sent is None:
                self._progress.warn(f"round {round}: a reply that nobody asked for was dropped")
                continue
            peer, task, down = sent
            up = size(reply.content) if reply.has_content() else 0
            line = _line(round, peer, down, up)
            try:
                update = read_update(reply, task, peer, round)
            except IncompatibleUpdates as error:
                self._progress.warn(f"round {round}: client {peer.id} dropped: {error}")
                lines.append(line | {"status": "dropped", "reason": str(error)})
                continue
            updates.append(update)
            lines.append({**update.metrics, **line, "examples": int(update.weight), "status": "ok"})
        for peer, _, down in self._sent.values():
            lines.append(_line(round, peer, down, 0) | {"status": "dropped", "reason": "no reply"})
            self._progress.warn(f"round {round}: client {peer.id} dropped: no reply")
        updates.sort(key=lambda update: update.peer.id if update.peer else -1)
        return updates, sorted(lines, key=lambda line: int(line["client"]))

    def _totals(self, round: int, lines: list[dict[str, Any]], metrics: dict[str, Any]) -> dict[str, Any]:
        """The round's line of metrics.jsonl."""
        good = [line for line in lines if line["status"] == "ok"]
        told = [line for line in good if "loss" in line]
        examples = sum(line["examples"] for line in told)
        own = [line["local_accuracy"] for line in good if "local_accuracy" in line]
        return {
            "round": round,
            **metrics,
            "train_loss": sum(line["loss"] * line["examples"] for line in told) / examples if told else None,
            **({"local_accuracy": statistics.fmean(own)} if own else {}),
            "bytes_down": sum(line["bytes_down"] for line in lines),
            "bytes_up": sum(line["bytes_up"] for line in lines),
            "seconds": time.perf_counter() - self._began,
            "clients": len(good),
            "dropped": len(lines) - len(good),
            "epsilon": None,
        }


def _line(round: int, peer: Peer, down: int, up: int) -> dict[str, Any]:
    """What every line of clients.jsonl has."""
    return {"round": round, "client": peer.id, "rank": peer.rank, "bytes_down": down, "bytes_up": up}


def _certificate(state: State, updates: Sequence[Update]) -> dict[str, float]:
    """How far the new global ΔW is from the clients' weighted mean, relative, over all modules; and its size.

    Zero where a strategy is exact; FedIT's is the cross-covariance of its factors.
    """
    if not state.adapter.pairs:
        return {}
    weights = normalised([update.weight for update in updates])
    errors, sizes, deltas, ranks = [], [], [], []
    for name, pair in state.adapter.pairs.items():
        error, length = error_and_norm([u.adapter.pairs[name] for u in updates], weights, pair)
        errors.append(error)
        sizes.append(length)
        deltas.append(norm(pair))
        ranks.append(effective_rank(pair))
    total = math.hypot(*sizes)
    return {
        "aggregation_error": math.hypot(*errors) / total if total else 0.0,
        "delta_norm": math.hypot(*deltas),
        "effective_rank": statistics.fmean(ranks),
    }
