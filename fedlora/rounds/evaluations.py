"""Evaluations beside that of the state: each client's own model, and each client's update by itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.core.messages import Peer, Task
from fedlora.rounds.codec import metrics_of, write_task
from fedlora.rounds.exchange import Received
from fedlora.rounds.pending import PendingMessages
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round_config import RoundConfig


def ask_clients(
    grid: Grid,
    registry: ClientRegistry,
    task: Callable[[Peer], Task],
    config: RoundConfig,
    warn: Callable[[str], None],
) -> dict[int, dict[str, float]]:
    """The metrics of each client's own model on the rows that the client keeps back, by client id.

    Args:
        grid: how clients are reached.
        registry: the clients.
        task: gives what a client starts from.
        config: the run's.
        warn: takes a line about every client that could not evaluate.
    """
    found, asked = dict[int, dict[str, float]](), PendingMessages()

    def questions() -> Iterator[Message]:
        for node in registry.gather(grid):
            content = write_task(task(registry.peers[node]), config.rounds + 1, config.seed)[0]
            yield asked.note(Message(content, node, "evaluate", ttl=config.timeout))

    for reply in grid.send_and_receive(questions(), timeout=config.timeout):
        if (node := asked.node(reply)) is None or registry.peers[node].id in found:
            continue
        if reply.has_error() or "metrics" not in reply.content.metric_records:
            why = reply.error.reason if reply.has_error() else "its reply has no metrics"
            warn(f"{registry.peers[node].called} could not evaluate its model: {why}")
            continue
        found[registry.peers[node].id] = metrics_of(dict(reply.content.metric_records["metrics"]))
    return dict(sorted(found.items()))


def evaluate_updates(
    received: Received,
    evaluate: Callable[[Sequence[Task]], list[tuple[float, float]]],
    named: Callable[[float, float], dict[str, float]],
) -> None:
    """Evaluate each client's update by itself, and put the metrics into the client's line."""
    both = zip(received.updates, received.tasks, strict=True)
    alone = evaluate([replace(task, adapter=update.adapter) for update, task in both])
    found = {u.peer.id: named(*m) for u, m in zip(received.updates, alone, strict=True) if u.peer}
    for line in received.lines:
        line |= {f"test_{name}": value for name, value in found.get(line["client"], {}).items()}
