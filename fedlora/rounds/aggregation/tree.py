"""Aggregation over a tree: edges add up their clients' updates, the strategy is shown the server's edges."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.core.bundle import bundle, forwarded
from fedlora.core.messages import Peer, Task, Update
from fedlora.core.strategy import next_state
from fedlora.core.update_step import RoundUpdates, UpdateStep
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.aggregation.base import Aggregated, Aggregation, Delivery
from fedlora.rounds.aggregation.plain import applied
from fedlora.rounds.aggregation_error import sizes
from fedlora.rounds.codec import size
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.sanity_checks import check_updates
from fedlora.rounds.tree import (
    Path,
    Tree,
    below,
    called,
    read_masked_sum,
    read_sum,
    read_tasks,
    write_masked_sum,
    write_report,
    write_sum,
    write_tasks,
)
from fedlora.secure_aggregation.crypto import Words


class TreeDelivery(Delivery):
    """Messages go from edge to edge, and their bytes are counted on every link that is no client's.

    Args:
        inner: how clients deliver; what they send is read as it reads it.
        tree: where the clients are.
    """

    def __init__(self, inner: Delivery, tree: Tree) -> None:
        super().__init__(inner.nodes)
        self.inner, self._tree = inner, tree
        self._edges = dict[int, Path]()  # of the nodes that have answered
        self._bytes = Counter[tuple[str, bool]]()  # (direction, whether the link is the server's) -> bytes
        self._of_clients = Counter[str]()

    def pass_on(self, direction: str, level: int, content: RecordDict) -> RecordDict:
        """Count a message between the edges of a level, 0 for the server's, and those above them."""
        self._bytes[direction, level == 0] += size(content)
        return content

    def records(self, node: int) -> Mapping[str, ConfigRecord]:
        """What a node needs to deliver."""
        return self.inner.records(node)

    def read(self, reply: Message, task: Task, peer: Peer, round: int) -> Update:
        """The update that a reply holds."""
        self._edges[reply.metadata.src_node_id] = self._tree.edge(peer.id)
        return self.inner.read(reply, task, peer, round)

    def added(self, vectors: Mapping[int, Words]) -> Words:
        """The sum mod 2^64 of masked vectors, to which every edge adds those of the nodes below it.

        Masks cancel in the sum of all alone, so that what an edge has and sends is random words to it.
        """
        items = [(self._edges[node], [node], vector) for node, vector in sorted(vectors.items())]
        items.sort(key=lambda item: item[0])
        for level in reversed(range(self._tree.levels)):
            sums = []
            for path, part in below(items, lambda item: item[0], level):
                nodes = [node for _, own, _ in part for node in own]
                total: Words = reduce(np.add, [vector for _, _, vector in part])
                message = self.pass_on("up", level, write_masked_sum(total, nodes))
                sums.append((path, nodes, read_masked_sum(message, len(total))))
            items = sums
        return reduce(np.add, [vector for _, _, vector in items])

    def sent(self, messages: Iterable[tuple[Peer, Message]]) -> Iterator[Message]:
        """The messages, after each has gone down the tree with the others of its edges."""
        for _, part in groupby(messages, key=lambda pair: self._tree.edge(pair[0].id)[:1]):
            held = list(part)  # of one edge of the server at a time
            edges = {message.metadata.dst_node_id: self._tree.edge(peer.id) for peer, message in held}
            arrived = self._down({m.metadata.dst_node_id: m.content for _, m in held}, edges, 0)
            for _, message in held:
                message.content = arrived[message.metadata.dst_node_id]
                yield message

    def _down(
        self, contents: Mapping[int, RecordDict], edges: Mapping[int, Path], level: int
    ) -> dict[int, RecordDict]:
        """What arrives at the clients of what is sent to the edges of a level."""
        if level == self._tree.levels:
            return dict(contents)
        found = dict[int, RecordDict]()
        for _, nodes in below(list(contents), edges.__getitem__, level):
            message = write_tasks({node: contents[node] for node in nodes})
            arrived = read_tasks(self.pass_on("down", level, message))
            found |= self._down({node: arrived[node] for node in nodes}, edges, level + 1)
        return found

    def count(
        self,
        round: int,
        peers: Mapping[int, Peer],
        lines: list[dict[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        """Count what edges report of their clients, what they only pass on, and the links of the clients."""
        before = {way: sum(line[f"bytes_{way}"] for line in lines) for way in ("down", "up")}
        self.inner.count(round, peers, lines, warn)
        for level in range(self._tree.levels):
            for _, part in below(lines, lambda line: self._tree.edge(line["client"]), level):
                self.pass_on("up", level, write_report(part))
        for way, tasks_or_updates in before.items():
            self._of_clients[way] = sum(line[f"bytes_{way}"] for line in lines)
            for level in range(self._tree.levels):  # keys and shares, message for message
                self._bytes[way, level == 0] += self._of_clients[way] - tasks_or_updates

    def traffic(self) -> dict[str, int]:
        """The bytes of the server's own links, and of all links of the tree, the clients' included."""
        found = dict[str, int]()
        for way in ("down", "up"):
            root, inner = self._bytes[way, True], self._bytes[way, False]
            found |= {f"root_bytes_{way}": root, f"all_bytes_{way}": root + inner + self._of_clients[way]}
        return found


@dataclass(frozen=True)
class TreeAggregation(Aggregation):
    """Every edge forwards one update for all clients below it, and the strategy combines those of the server.

    Args:
        tree: where the clients are.
        config: how many updates a round needs, and how clients are weighted.
        steps: codes of which the clients apply one half, and their edge the other.
        sparse: whether updates hold a few numbers of each change.
    """

    tree: Tree
    config: RoundConfig
    steps: Sequence[UpdateStep] = ()
    sparse: bool = False

    def open(self, grid: Grid, nodes: Sequence[int], round: int, wide: Callable[[], Task]) -> Delivery:
        """Send over the tree."""
        return TreeDelivery(Delivery(nodes), self.tree)

    def aggregate(self, given: RoundUpdates, delivery: Delivery, rng: np.random.Generator) -> Aggregated:
        """Add up from level to level, and combine what reaches the server.

        An edge that cannot forward an update is lost with all clients below it, which count as dropped.
        """
        assert isinstance(delivery, TreeDelivery)
        items, notes, said = self._decoded(given)
        lost = dict[int, str]()  # client -> why
        for level in reversed(range(self.tree.levels)):
            sums = list[tuple[Path, Update]]()
            for path, part in below(items, lambda item: item[0], level):
                try:
                    sums.append((path, self._forwarded(given, delivery, path, [u for _, u in part])))
                except IncompatibleUpdates as error:
                    gone = [u.peer for u in given.updates if u.peer and self._edge(u)[: level + 1] == path]
                    gone = [peer for peer in gone if peer.id not in lost]
                    lost |= {peer.id: f"{called(path)}: {error}" for peer in gone}
                    names = ", ".join(peer.called for peer in gone)
                    said.append(f"{called(path)} was lost, and with it {names}: {error}")
            items = sums
        notes |= {client: {"status": "dropped", "reason": why} for client, why in lost.items()}
        least, heard = self.config.least(len(delivery.nodes)), len(given.updates) - len(lost)
        if heard < max(1, least):
            said.append(f"{heard} good updates are left, {least} needed; the state stays as it was")
            return Aggregated(given.state, {}, notes, said)
        state = next_state(given.strategy, given.state, [update for _, update in items], rng)
        return Aggregated(state, {**state.metrics, **sizes(state)}, notes, said)

    def _decoded(
        self, given: RoundUpdates
    ) -> tuple[list[tuple[Path, Update]], dict[int, Mapping[str, Any]], list[str]]:
        """The clients' updates as their own edges read them, with notes and what looks wrong there."""
        items, notes, odd = list[tuple[Path, Update]](), dict[int, Mapping[str, Any]](), list[str]()
        both = list(zip(given.updates, given.tasks, strict=True))
        for path, part in below(both, lambda pair: self._edge(pair[0]), self.tree.levels - 1):
            updates = [update for update, _ in part]
            if self.config.weights == "uniform":
                updates = [replace(update, weight=1.0) for update in updates]
            there = applied(self.steps, given.become(updates, [task for _, task in part]))
            items += [(path, update) for update in there.updates]
            notes |= there.notes
            odd += [
                f"{called(path)}: {text}" for text in check_updates(there.updates, there.tasks, self.sparse)
            ]
        return items, notes, odd

    def _forwarded(
        self, given: RoundUpdates, delivery: TreeDelivery, path: Path, updates: Sequence[Update]
    ) -> Update:
        """What those above an edge read of it."""
        wide, peer = given.wide, Peer(path[-1], given.widest.rank, name=called(path))
        whole = bundle(given.strategy, given.state, wide, updates, peer)
        names = forwarded(given.strategy, wide)
        message = delivery.pass_on("up", len(path) - 1, write_sum(whole, names))
        return read_sum(message, wide, names, peer, given.state.round)

    def _edge(self, update: Update) -> Path:
        assert update.peer is not None, "updates come from clients"
        return self.tree.edge(update.peer.id)
