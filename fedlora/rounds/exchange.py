"""What was sent to which node in a round, and what of the replies is good."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message

from fedlora.core.messages import Peer, Task, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import Held, size, write_task
from fedlora.rounds.pending import PendingMessages
from fedlora.storage.client_state import FOLD, forgotten

GRACE = 60.0  # seconds for which a message outlives its round, so that who is late is known to be alive
Read = Callable[[Message, Task, Peer, int], Update]


class MessageExchange:
    """Tasks out, updates in: each reply is checked against what its node was sent in this round.

    Args:
        warn: takes a line for the user about every client that is dropped.
        patience: seconds after which a reply is missing; None for never.
    """

    def __init__(self, warn: Callable[[str], None], patience: float | None = None) -> None:
        self._warn, self._patience = warn, patience
        self._round = 0
        self._asked = PendingMessages()
        self._sent: dict[int, tuple[Peer, Task, int, Held]] = {}
        self._held: dict[int, Held] = {}
        self._seen: dict[str, int] = {}  # a fold's tensor -> the last version in which a client received it

    def send(
        self,
        node: int,
        peer: Peer,
        task: Task,
        round: int,
        seed: int,
        version: int,
        more: Mapping[str, ConfigRecord],
    ) -> Message:
        """A node's message, `more` records in it; a new round forgets what was sent before."""
        if round != self._round:
            self._round, self._sent, self._asked = round, {}, PendingMessages()
        self._forget(version)
        held = self._held.pop(node, None)  # until it answers, nobody knows what it has received
        content, held = write_task(task, round, seed, held, version)
        content.update(more)
        self._sent[node] = (peer, task, size(content), held)
        ttl = None if self._patience is None else self._patience + GRACE
        return self._asked.note(Message(content, node, "train", ttl=ttl, group_id=str(round)))

    def _forget(self, version: int) -> None:
        """No longer count on folds that clients of one process have dropped by now (`Shelf`)."""
        old = forgotten(self._seen, version)
        for seal in old:
            del self._seen[seal]
        for node, held in self._held.items() if old else ():
            kept = {
                name: seal
                for name, seal in held.digests.items()
                if not (name.startswith(FOLD) and seal in old)
            }
            self._held[node] = Held(kept, held.version)

    def receive(
        self, round: int, replies: Iterable[Message], read: Read
    ) -> tuple[list[Update], list[Task], list[dict[str, Any]]]:
        """The good updates in the order of clients, their tasks, and a line for the log a client.

        Args:
            round: the round, from 1.
            replies: what came.
            read: from a reply, the task that it answers, who sent it, and the round, to an update.
        """
        good: list[tuple[Update, Task]] = []
        lines: list[dict[str, Any]] = []
        strays: set[int] = set()
        for reply in replies:
            # A client may reply once a round, and only to what it was sent.
            node = self._asked.node(reply)
            sent = None if node is None else self._sent.pop(node, None)
            if node is None or sent is None:
                self._warn(f"round {round}: a reply that nobody asked for was dropped")
                strays.add(reply.metadata.src_node_id)
                continue
            peer, task, down, held = sent
            up = size(reply.content) if reply.has_content() else 0
            line = line_of(round, peer, down, up)
            try:
                update = read(reply, task, peer, round)
            except IncompatibleUpdates as error:
                self._warn(f"round {round}: {peer.called} dropped: {error}")
                lines.append(line | {"status": "dropped", "reason": str(error)})
                continue
            self._held[node] = held
            if held.version is not None:
                self._seen |= dict.fromkeys(_folds(held).values(), held.version)
            good.append((update, task))
            valid = {n: bool(x) for n, x in update.metrics.items() if n == "epsilon_valid"}
            told = {**update.metrics, **valid, **line}
            lines.append({**told, "examples": int(update.weight), "status": "ok"})
        for node, (peer, _, down, _) in self._sent.items():
            why = "no reply by the end of the round"
            why = f"{why}, but one to another message, such as a former round's" if node in strays else why
            lines.append(line_of(round, peer, down, 0) | {"status": "dropped", "reason": why})
            self._warn(f"round {round}: {peer.called} dropped: {why}")
        self._sent = {}
        good.sort(key=lambda found: found[0].peer.id if found[0].peer else -1)
        lines.sort(key=lambda line: int(line["client"]))
        return [update for update, _ in good], [task for _, task in good], lines


def _folds(held: Held) -> dict[str, str]:
    """The digests of a fold's tensors by name."""
    return {name: seal for name, seal in held.digests.items() if name.startswith(FOLD)}


def line_of(round: int, peer: Peer, down: int, up: int) -> dict[str, Any]:
    """What every line of clients.jsonl has."""
    name = {"name": peer.name} if peer.name else {}
    return {"round": round, "client": peer.id, **name, "rank": peer.rank, "bytes_down": down, "bytes_up": up}
