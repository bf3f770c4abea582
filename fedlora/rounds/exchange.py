"""What was sent to which node, and which of the replies are good."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ConfigRecord, Message

from fedlora.compression import Compression, MessageKey
from fedlora.compression.words import for_downloads, for_uploads
from fedlora.core.messages import Peer, Task, Update
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import Held, size, write_task
from fedlora.rounds.compressed import code_task, plain_update
from fedlora.rounds.pending import PendingMessages
from fedlora.storage.client_state import BASE_DELTA, forgotten, last_seen

GRACE = 60.0  # seconds for which a message outlives its round, so that a late node is known to be alive
Read = Callable[[Message, Task, Peer, int], Update]


@dataclass(frozen=True)
class Received:
    """The outcome of a round's messages.

    Args:
        updates: the good updates, in the order of their clients' ids.
        tasks: the task that each update answers.
        lines: the lines of clients.jsonl, one for each client, in the order of the ids.
    """

    updates: list[Update]
    tasks: list[Task]
    lines: list[dict[str, Any]]

    def plus(self, other: "Received") -> "Received":
        """Both together, in the order of the clients' ids."""
        pairs = [*zip(self.updates, self.tasks, strict=True), *zip(other.updates, other.tasks, strict=True)]
        pairs.sort(key=lambda found: found[0].peer.id if found[0].peer else -1)
        lines = sorted([*self.lines, *other.lines], key=lambda line: int(line["client"]))
        return Received([update for update, _ in pairs], [task for _, task in pairs], lines)


@dataclass(frozen=True)
class _Sent:
    """A task that a node has not answered yet."""

    peer: Peer
    task: Task
    round: int
    version: int
    bytes_down: int
    held: Held


class MessageExchange:
    """Sends tasks and receives updates; a reply is checked against the task that its node was sent.

    Args:
        warn: takes a line for the user about every client that is dropped.
        seed: the run's, which every task carries.
        timeout: seconds after which a reply counts as missing; None for never.
        compression: how the numbers of messages travel; None as they are.
        masked: whether updates come under masks, so that no single one is read here.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        seed: int,
        timeout: float | None = None,
        compression: Compression | None = None,
        masked: bool = False,
    ) -> None:
        self._warn, self._seed, self._timeout = warn, seed, timeout
        self._down, self._up = for_downloads(compression), None if masked else for_uploads(compression)
        self._pending = PendingMessages()
        self._sent: dict[int, _Sent] = {}
        self._held: dict[int, Held] = {}
        self._called: dict[int, str] = {}  # node -> the name of the client that was last sent a task there
        self._seen: dict[str, int] = {}  # digest of a base delta's tensor -> the last version sent
        self._newest = -1  # the newest version of which a task was sent

    @property
    def waiting(self) -> set[int]:
        """The nodes that have not answered yet."""
        return {*self._sent}

    def message(
        self,
        node: int,
        peer: Peer,
        task: Task,
        round: int,
        version: int,
        more: Mapping[str, ConfigRecord] | None = None,
    ) -> Message:
        """The training message of a node, which is remembered until its reply has come.

        Args:
            node: the node that it goes to.
            peer: the client there.
            task: the client's task.
            round: the round, from 1.
            version: the `State.round` of the state that the task comes from.
            more: other records to send with it.
        """
        self._forget(version)
        held = self._held.pop(node, None)  # until it answers, nobody knows what it has received
        content, held = write_task(task, round, self._seed, held, version)
        if self._down:
            code_task(content, task, self._down, MessageKey(self._seed, peer.id, round, down=True))
        content.update(more or {})
        self._called[node] = peer.called
        self._sent[node] = _Sent(peer, task, round, version, size(content), held)
        ttl = None if self._timeout is None else self._timeout + GRACE
        return self._pending.note(Message(content, node, "train", ttl=ttl, group_id=str(round)))

    def receive(
        self, round: int, replies: Iterable[Message], read: Read, keep_waiting: bool = False
    ) -> Received:
        """Read replies, and drop those clients whose reply is wrong or missing.

        Args:
            round: the round that the replies belong to in the logs, from 1.
            replies: those that came.
            read: makes an update of a reply, given the task that it answers, the client, and the round of
                that task. It raises IncompatibleUpdates where the reply is no update.
            keep_waiting: whether clients that have not answered may still do so in a later round.
        """
        good: list[tuple[Update, Task]] = []
        lines: list[dict[str, Any]] = []
        strays: set[int] = set()
        for reply in replies:
            # A client may reply once, and only to what it was sent.
            node = self._pending.node(reply)
            sent = None if node is None else self._sent.pop(node, None)
            if node is None or sent is None:
                who = "" if node is None else f" of {self._called[node]}, which has answered or is too late,"
                self._warn(f"round {round}: a reply{who} that nobody asked for was dropped")
                strays.add(reply.metadata.src_node_id)
                continue
            line = line_of(
                round, sent.peer, sent.bytes_down, size(reply.content) if reply.has_content() else 0
            )
            try:
                if self._up:
                    plain_update(reply, sent.task, self._up, MessageKey(self._seed, sent.peer.id, sent.round))
                update = read(reply, sent.task, sent.peer, sent.round)
            except IncompatibleUpdates as error:
                self._warn(f"round {round}: {sent.peer.called} dropped: {error}")
                lines.append(line | {"status": "dropped", "reason": str(error)})
                continue
            self._learn(node, sent.held)
            good.append((replace(update, version=sent.version), sent.task))
            valid = {n: bool(x) for n, x in update.metrics.items() if n == "epsilon_valid"}
            reported = {**update.metrics, **valid, **line}
            lines.append({**reported, "examples": int(update.weight), "status": "ok"})
        if not keep_waiting:
            lines += self._missing(round, strays)
        good.sort(key=lambda found: found[0].peer.id if found[0].peer else -1)
        lines.sort(key=lambda line: int(line["client"]))
        return Received([update for update, _ in good], [task for _, task in good], lines)

    def _missing(self, round: int, strays: set[int]) -> list[dict[str, Any]]:
        """The lines of the clients that have not answered; nobody waits for them any more."""
        lines = []
        for node, sent in self._sent.items():
            why = "no reply by the end of the round"
            why = f"{why}, but one to another message, such as a former round's" if node in strays else why
            lines.append(line_of(round, sent.peer, sent.bytes_down, 0) | {"status": "dropped", "reason": why})
            self._warn(f"round {round}: {sent.peer.called} dropped: {why}")
        self._sent, self._pending = {}, PendingMessages()
        return lines

    def give_up(self, round: int, nodes: Iterable[int], why: str) -> list[dict[str, Any]]:
        """The lines of clients for whose replies nobody waits any more.

        Args:
            round: the round that the lines belong to.
            nodes: those of the clients.
            why: what each line gives as the reason.
        """
        lines = []
        for node in nodes:
            sent = self._sent.pop(node)
            lines.append(line_of(round, sent.peer, sent.bytes_down, 0) | {"status": "dropped", "reason": why})
            self._warn(f"round {round}: {sent.peer.called} dropped: {why}")
        return lines

    def _learn(self, node: int, held: Held) -> None:
        """Rely on what a node has received, now that it has answered."""
        self._held[node] = held
        if held.version is not None:
            self._seen |= last_seen(self._seen, _base_deltas(held).values(), held.version)

    def _forget(self, version: int) -> None:
        """Stop relying on base deltas that clients of one process have dropped by now (`DownloadCache`)."""
        self._newest = max(self._newest, version)  # a task of an old version may be written after a newer one
        old = forgotten(self._seen, self._newest)
        for seal in old:
            del self._seen[seal]
        for node, held in self._held.items() if old else ():
            kept = {
                name: seal
                for name, seal in held.digests.items()
                if not (name.startswith(BASE_DELTA) and seal in old)
            }
            self._held[node] = Held(kept, held.version)


def _base_deltas(held: Held) -> dict[str, str]:
    """The digests of a base delta's tensors by name."""
    return {name: seal for name, seal in held.digests.items() if name.startswith(BASE_DELTA)}


def line_of(round: int, peer: Peer, down: int, up: int) -> dict[str, Any]:
    """The keys that every line of clients.jsonl has."""
    name = {"name": peer.name} if peer.name else {}
    return {"round": round, "client": peer.id, **name, "rank": peer.rank, "bytes_down": down, "bytes_up": up}
