"""A round of 10,000 clients over a tree, and flat: python experiments/benchmarks/tree.py [CLIENTS FAN ...].

No client trains: each sends its task's adapter with noise on what it shares. What is measured is what the
tree is: messages down and up over every link, sums at every edge, the strategy at the server. The ranks of
the clients are 2, 4 and 8 in turn, the layers four of 64 × 64 and a head. Seconds are those of one core.
"""

import resource
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedlora import strategies
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.core.update_step import RoundUpdates
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.codec import size, write_task, write_update
from fedlora.rounds.round_config import RoundConfig
from fedlora.training.client import TrainResult

LAYERS = tuple(f"layer.{i}" for i in range(4))
SIDE, RANKS = 64, (2, 4, 8)


def main(clients: int = 10_000, *fans: int) -> None:
    """One round of FlexLoRA, over the tree and flat."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # else Flower makes no message
    tree, strategy, rng = fans or (10, 100, 10), strategies.FlexLoRA(), np.random.default_rng(0)
    print(f"{clients} clients, tree {list(tree)}")
    state = strategy.init(Adapter({m: _pair(rng) for m in LAYERS}, {"head.weight": _noise(rng, 2, SIDE)}))
    peers = [Peer(client, RANKS[client % len(RANKS)]) for client in range(clients)]
    tasks = [strategy.task(state, peer) for peer in peers]
    updates = [_update(rng, task, peer) for task, peer in zip(tasks, peers, strict=True)]
    found = {fans: _round(strategy, state, peers, tasks, updates, fans) for fans in (tree, ())}
    gap = max(float((found[tree].delta(m) - found[()].delta(m)).norm()) for m in LAYERS)
    norm = max(float(found[()].delta(m).norm()) for m in LAYERS)
    print(f"  ΔW of both differs by {gap / norm:.0e} of its norm")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"  peak memory {peak:.0f} MB, of which all updates take {sum(map(_bytes, updates)) / 2**20:.0f} MB"
    )


def _round(
    strategy: Strategy,
    state: State,
    peers: Sequence[Peer],
    tasks: Sequence[Task],
    updates: Sequence[Update],
    fans: tuple[int, ...],
) -> State:
    config = RoundConfig(rounds=1, seed=0, clients=len(peers), tree=fans)
    aggregation, down = aggregation_for(config), 0
    delivery = aggregation.open(None, range(len(peers)), 1, lambda: tasks[0])  # type: ignore[arg-type]
    began = time.process_time()
    for message in delivery.sent(_messages(peers, tasks)):
        down += size(message.content)
    sent = time.process_time() - began
    up = sum(
        size(write_update(TrainResult(u.adapter, {}), t, 1, 1)) for u, t in zip(updates, tasks, strict=True)
    )
    began = time.process_time()
    given = RoundUpdates(strategy, state, updates, tasks, Peer(0, max(RANKS)))
    after = aggregation.aggregate(given, delivery, np.random.default_rng(0)).state
    combined = time.process_time() - began
    root = delivery.traffic() or {"root_bytes_down": down, "root_bytes_up": up}
    mb = [root[f"root_bytes_{way}"] / 1e6 for way in ("down", "up")]
    print(
        f"  {'tree' if fans else 'flat'}: {sent:5.1f} s down, {combined:5.1f} s up; the server's links "
        f"{mb[0]:7.2f} MB down, {mb[1]:7.2f} MB up"
    )
    return after


def _messages(peers: Sequence[Peer], tasks: Sequence[Task]) -> Iterator[tuple[Peer, Message]]:
    for peer, task in zip(peers, tasks, strict=True):
        yield peer, Message(write_task(task, 1, 0)[0], peer.id, "train")


def _update(rng: np.random.Generator, task: Task, peer: Peer) -> Update:
    now = dict(task.adapter.tensors())
    moved = {name: now[name] + 0.1 * _noise(rng, *now[name].shape) for name in task.shared()}
    return Update(task.adapter.with_tensors(moved), float(1 + peer.id % 50), peer)


def _pair(rng: np.random.Generator) -> Pair:
    return Pair(_noise(rng, max(RANKS), SIDE), torch.zeros(SIDE, max(RANKS)), 2.0)


def _noise(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


def _bytes(update: Update) -> int:
    return sum(tensor.nbytes for _, tensor in update.adapter.tensors())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
