"""The clients that take part: which nodes are connected, and which client each of them is."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora.core.messages import Peer
from fedlora.errors import FedLoraError, IncompatibleUpdates
from fedlora.rounds.pending import PendingMessages
from fedlora.rounds.round_config import RoundConfig

AWAY = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
PATIENCE = 900.0  # seconds for a node on another machine to load its model and say who it is
PAUSE = 0.5  # seconds between two checks of which nodes are connected
SILENT = 5.0  # seconds of waiting before the user is told of it


class ClientRegistry:
    """Nodes and their clients. A node is asked once which client it is, and again after it was away.

    Args:
        peer: makes what the strategy knows of a client, from the client's id and rank.
        most: the largest rank that the run can serve.
        warn: takes a line for the user about every node that cannot take part.
        plan: what a node has to know of the run before it can say whether it takes part.
        names: node -> the name of its site, as the operator has registered it.
        mixed: whether clients may hold smaller ranks; the strategy's `mixed_ranks`.
    """

    def __init__(
        self,
        peer: Callable[[int, int], Peer],
        most: int,
        warn: Callable[[str], None],
        plan: Mapping[str, str | int | list[str]] | None = None,
        names: Mapping[int, str] | None = None,
        mixed: bool = True,
    ) -> None:
        self._peer, self._most, self._warn, self._mixed = peer, most, warn, mixed
        self._plan = dict(plan or {})
        self._patience = PATIENCE if plan else None  # in one process nobody is ever late
        self._names = dict(names or {})
        self._met: dict[int, Peer] = {}  # client id -> every client that was ever connected
        self.refused: set[int] = set()  # connected nodes that cannot take part
        self.peers: dict[int, Peer] = {}
        self.profiles: dict[int, dict[str, Any]] = {}  # node -> what it said of itself
        self.heard: dict[int, float] = {}  # node -> when it said so, by this machine's clock

    @property
    def widest(self) -> Peer:
        """A client of the largest rank that the run can serve, whether or not one is connected.

        Every sum of a round has the form of this client's task: its length must not depend on which clients
        are connected.
        """
        return self._peer(0, self._most)

    def kinds(self, clients: int) -> list[tuple[Peer, int]]:
        """A client of every rank, the largest first, and how many of so many clients are like it.

        One that never came is taken to have the largest rank that the run can serve.
        """
        ranks = Counter(peer.rank for peer in self._met.values())
        ranks[self._most] += max(0, clients - len(self._met))
        return [(self._peer(0, rank), count) for rank, count in sorted(ranks.items(), reverse=True)]

    def gather(self, grid: Grid, least: int = 1, wait: float = 0.0) -> list[int]:
        """The connected nodes that can take part, in the order of their clients' ids.

        Args:
            grid: how they are reached.
            least: how many it takes to begin.
            wait: seconds to wait for that many.

        Raises:
            FedLoraError: no client can take part after that time.
        """
        began, said = time.monotonic(), False
        while True:
            there = self._known(grid)
            waited = time.monotonic() - began
            if len(there) >= least or waited >= wait:
                break
            if self._plan and len(there) + len(self.refused) >= least:
                break  # all have come, and a refused node stays refused
            if waited > SILENT and not said:
                others = ", ".join(self.away(least)) or "the others"
                self._warn(
                    f"{len(there)} of {least} clients are there; waiting for {others}, {wait:g} s at most"
                )
                said = True
            time.sleep(PAUSE)
        if not there:
            who = ", ".join(map(self.called, sorted(self.refused)))
            why = f"{who} cannot, for the reason above" if who else "are the nodes up?"
            raise FedLoraError(f"no client took part within {wait:g} s; {why}")
        return sorted(there, key=lambda node: self.peers[node].id)

    def present(self, grid: Grid, round: int, least: int, config: RoundConfig) -> tuple[list[int], list[str]]:
        """The nodes of a round that are connected, as `gather` gives them, and the clients that are not.

        The user is told of those, by their names.
        """
        there = self.gather(grid, least, config.wait)
        if away := self.away(config.clients):
            some = len(there)
            self._warn(
                f"round {round}: {', '.join(away)} away, {some} of {some + len(away)} clients are there"
            )
        return there, away

    def called(self, node: int) -> str:
        """The name of a node in messages: that of its site, or the number of its client."""
        return self._names.get(node) or (self.peers[node].called if node in self.peers else f"node {node}")

    @property
    def apart(self) -> bool:
        """Whether nodes are sites on other machines, which may be away."""
        return bool(self._plan)

    def missing(self) -> list[Peer]:
        """The clients that were connected before and are not now, in the order of their ids."""
        here = {peer.id for peer in self.peers.values()}
        return [peer for client, peer in sorted(self._met.items()) if client not in here]

    def away(self, clients: int) -> list[str]:
        """The names of those of so many clients that are not connected; none in one process."""
        if not self.apart:
            return []
        missing = self.missing()
        never = sorted(set(range(clients)) - self._met.keys())
        seen = {peer.name for peer in self._met.values()}
        named = [name for name in self._names.values() if name not in seen]
        # Clients that never came have given no number; if as many site names are unused, those are theirs.
        others = named if len(named) == len(never) else [f"client {client}" for client in never]
        return [peer.called for peer in missing] + others

    def _known(self, grid: Grid) -> list[int]:
        online = set(grid.get_node_ids())
        if away := (self.peers.keys() | self.refused) - online:
            self.peers = {node: peer for node, peer in self.peers.items() if node not in away}
            self.refused = set()  # what stood in a node's way, such as another of its name, may be gone
        if new := sorted(online - self.peers.keys() - self.refused):
            self._meet(grid, new)
        return [node for node in self.peers if node in online]

    def _meet(self, grid: Grid, nodes: list[int]) -> None:
        """Ask nodes which client they are, and of what rank."""
        asked, content = (
            PendingMessages(),
            RecordDict({"plan": ConfigRecord(dict(self._plan))} if self._plan else {}),
        )
        questions = [asked.note(Message(content, n, "query.profile", ttl=self._patience)) for n in nodes]
        taken, hoped = {peer.id for peer in self.peers.values()}, set(nodes)
        for reply in grid.send_and_receive(questions, timeout=self._patience):
            if (node := asked.node(reply)) is None or node not in hoped:
                continue
            if reply.has_error() and reply.error.code in AWAY:
                continue  # it is asked again
            try:
                peer = self._read(reply, taken)
                self.peers[node] = self._met[peer.id] = replace(peer, name=self._names.get(node, ""))
                taken.add(peer.id)
                self.profiles[node] = dict(reply.content.config_records["profile"])
                self.heard[node] = time.time()
            except IncompatibleUpdates as error:
                self.refused.add(node)
                self._warn(f"{self.called(node)} cannot take part: {error}")

    def _read(self, reply: Message, taken: Collection[int]) -> Peer:
        """The client that a node says it is, unless another node is that client.

        Raises:
            IncompatibleUpdates: it cannot take part, or its profile is not valid.
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
        if not self._mixed and rank != self._most:
            raise IncompatibleUpdates(
                f"client {client} is of rank {rank}, and this run's strategy combines clients of one rank, "
                f"here {self._most}; give it that rank, or start the run with a strategy of mixed ranks"
            )
        if client in taken:
            raise IncompatibleUpdates(f"another node is client {client} already; give each its own number")
        return self._peer(client, rank)
