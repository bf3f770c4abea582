"""Who takes part: the nodes that are there, and which client each of them is."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora.engine.asked import Asked
from fedlora.errors import FedLoraError, IncompatibleUpdates
from fedlora.protocol import Peer

AWAY = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
PATIENCE = 900.0  # seconds for a node on another machine to load its model and say who it is
PAUSE = 0.5  # seconds between two looks at who is there
SILENT = 5.0  # seconds of waiting before anything is said of it


class Roster:
    """Nodes and their clients; a node says once which client it is, and again when it was away.

    Args:
        peer: from a client's id and rank to what the strategy knows of it.
        most: the largest rank that the run can serve.
        warn: takes a line for the user about every node that cannot take part.
        plan: what a node has to know of the run before it can say whether it takes part.
    """

    def __init__(
        self,
        peer: Callable[[int, int], Peer],
        most: int,
        warn: Callable[[str], None],
        plan: Mapping[str, str | int | list[str]] | None = None,
    ) -> None:
        self._peer, self._most, self._warn = peer, most, warn
        self._plan = dict(plan or {})
        self._patience = PATIENCE if plan else None  # in one process nobody is ever late
        self._refused: set[int] = set()
        self.peers: dict[int, Peer] = {}
        self.profiles: dict[int, dict[str, Any]] = {}  # what each said of itself
        self.heard: dict[int, float] = {}  # and when, by this machine's clock

    def gather(self, grid: Grid, least: int = 1, wait: float = 0.0) -> list[int]:
        """The nodes that are there, in the order of their clients' ids.

        Args:
            grid: how they are reached.
            least: how many it takes to begin.
            wait: seconds to wait for that many.

        Raises:
            FedLoraError: there is none at all after that time.
        """
        began, said = time.monotonic(), False
        while True:
            there = self._known(grid)
            waited = time.monotonic() - began
            if len(there) >= least or waited >= wait:
                break
            if waited > SILENT and not said:
                self._warn(f"{len(there)} of {least} clients are there; waiting for the others")
                said = True
            time.sleep(PAUSE)
        if not there:
            raise FedLoraError(f"no client took part within {wait:g} s; are the nodes up? resume goes on")
        return sorted(there, key=lambda node: self.peers[node].id)

    def _known(self, grid: Grid) -> list[int]:
        online = set(grid.get_node_ids())
        if away := (self.peers.keys() | self._refused) - online:
            self.peers = {node: peer for node, peer in self.peers.items() if node not in away}
            self._refused = set()  # what stood in a node's way, such as another of its name, may be gone
        if new := sorted(online - self.peers.keys() - self._refused):
            self._meet(grid, new)
        return [node for node in self.peers if node in online]

    def _meet(self, grid: Grid, nodes: list[int]) -> None:
        """Ask nodes which client they are, and of what rank."""
        asked, content = Asked(), RecordDict({"plan": ConfigRecord(dict(self._plan))} if self._plan else {})
        questions = [asked.note(Message(content, n, "query.profile", ttl=self._patience)) for n in nodes]
        taken, hoped = {peer.id for peer in self.peers.values()}, set(nodes)
        for reply in grid.send_and_receive(questions, timeout=self._patience):
            if (node := asked.node(reply)) is None or node not in hoped:
                continue
            if reply.has_error() and reply.error.code in AWAY:
                continue  # it is asked again
            try:
                self.peers[node] = self._read(reply, taken)
                taken.add(self.peers[node].id)
                self.profiles[node] = dict(reply.content.config_records["profile"])
                self.heard[node] = time.time()
            except IncompatibleUpdates as error:
                self._refused.add(node)
                self._warn(f"a node cannot take part: {error}")

    def _read(self, reply: Message, taken: Collection[int]) -> Peer:
        """Who a node says it is, if no other is that client.

        Raises:
            IncompatibleUpdates: it cannot take part, or what it says cannot be.
        """
        if reply.has_error():
            raise IncompatibleUpdates(reply.error.reason)
        profile = dict(reply.content.config_records.get("profile", {}))
        client, rank = profile.get("client"), profile.get("rank")
        if type(client) is not int or client < 0:
            raise IncompatibleUpdates(f"expected its client's number, 0 or more, got {client!r:.40}")
        if type(rank) is not int or not 1 <= rank <= self._most:
            raise IncompatibleUpdates(
                f"client {client} is of rank {rank!r:.40}, this run can serve 1 to {self._most}; start it "
                "with ranks=... that hold the largest"
            )
        if client in taken:
            raise IncompatibleUpdates(f"another node is client {client} already; give each its own number")
        return self._peer(client, rank)
