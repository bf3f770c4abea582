"""Flower's Grid in one process: no sockets, no Ray, and several clients trained in one pass.

Messages of a round are grouped in the order they were sent, as many clients together as a target of tokens
and memory allows; groups follow config and data, so that a run's result does not depend on the machine.
Replies are made when they are asked for, so that one group's are in memory at a time.
"""

import logging
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from fedlora.engines.base import Engine, Run, Session
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import ApartError, ConfigError, FedLoraError
from fedlora.rounds.codec import FAILED

TOKENS = 16384  # of a step: about thirty groups of clients, one a core; more make it no faster
MEMORY = 512 * 2**20  # bytes of a group's adapters with their gradients and optimizer states
FIRST_NODE = 1000

Record = ArrayRecord | ConfigRecord | MetricRecord


@dataclass(frozen=True)
class InProcess(Engine):
    """One process, no sockets: the clients are trained here, several of them in one pass.

    Args:
        fuse: clients that train in one pass: "auto", or a number.
    """

    fuse: int | str = "auto"

    def __post_init__(self) -> None:
        whole = isinstance(self.fuse, int) and not isinstance(self.fuse, bool) and self.fuse >= 1
        if self.fuse != "auto" and not whole:
            raise ConfigError(
                f"engine.fuse: expected auto or a whole number of at least 1, got {self.fuse!r}"
            )

    def run(self, run: Run) -> None:
        """Train the clients in this process."""
        with run.begin() as session:
            session.run(self.grid(session))

    def grid(self, session: Session) -> "InProcessGrid":
        """The clients of a session as a grid."""
        fuse = self.fuse if isinstance(self.fuse, int) else None
        return InProcessGrid(session.runtime, session.nodes, fuse, session.advance)


class InProcessGrid(Grid):
    """A federation whose nodes are objects of this process.

    Args:
        site: the clients' side.
        nodes: one config a node, as `--node-config` would give it: {"client": 3, "rank": 8}.
        fuse: clients that train together; None takes as many as fit a target of tokens and memory.
        done: called with the number of clients whenever some have finished.
    """

    def __init__(
        self,
        site: ClientRuntime,
        nodes: Sequence[Mapping[str, int]],
        fuse: int | None = None,
        done: Callable[[int], None] = lambda clients: None,
    ) -> None:
        self._site, self._fuse, self._done = site, fuse, done
        self._app = site.app()
        self._run = FlowerRun.create_empty(run_id=1)
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._replies: dict[str, Message] = {}
        self._contexts = {
            FIRST_NODE + i: Context(1, FIRST_NODE + i, dict(node), RecordDict(), {})
            for i, node in enumerate(nodes)
        }

    def set_run(self, run: FlowerRun) -> None:
        """Take another run's identity."""
        self._run = run

    @property
    def run(self) -> FlowerRun:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node, the old way; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; in one process none is ever away."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their replies wait for `pull_messages`."""
        replies = {reply.metadata.reply_to_message_id: reply for reply in self.send_and_receive(messages)}
        self._replies |= replies
        return list(replies)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to these messages."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies, group by group; nothing is ever late here."""
        for group in self._groups(messages):
            for message in group:
                message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            yield from self._answers(group)
            if group[0].metadata.message_type == "train":
                self._done(len(group))

    def _groups(self, messages: Iterable[Message]) -> Iterator[list[Message]]:
        """Training messages together, as many as fit; every other message alone."""
        group: list[Message] = []
        tokens = memory = 0
        for message in messages:
            one = self._cost(message)
            full = self._fuse is not None and len(group) >= self._fuse
            if self._fuse is None:
                full = bool(group) and (tokens + one[0] > TOKENS or memory + one[1] > MEMORY)
            kinds = {message.metadata.message_type, *(m.metadata.message_type for m in group[-1:])}
            if group and (full or kinds != {"train"}):
                yield group
                group, tokens, memory = [], 0, 0
            group.append(message)
            tokens, memory = tokens + one[0], memory + one[1]
        if group:
            yield group

    def _cost(self, message: Message) -> tuple[int, int]:
        """Tokens of a step, and bytes of parameters, gradients and two moments.

        Of the whole task, not of what is sent: that depends on what the client holds, which a resumed run
        sends once more, and groups must not.
        """
        if message.metadata.message_type != "train" or self._fuse is not None:
            return 0, 0
        context = self._contexts[message.metadata.dst_node_id]
        whole = message.content.config_records["config"]["whole"]
        return self._site.step_tokens(context), 4 * int(whole)  # type: ignore[arg-type]

    def _answers(self, group: list[Message]) -> list[Message]:
        requests = [self._delivered(message) for message in group]
        contexts = [self._contexts[message.metadata.dst_node_id] for message in group]
        try:
            if group[0].metadata.message_type == "train":
                replies = self._site.train(requests, contexts)
            else:
                replies = [self._app(r, context) for r, context in zip(requests, contexts, strict=True)]
        except Exception as error:
            # One client's failure must not take its group's work with it, so each is tried alone.
            if len(group) > 1:
                self._explain(error)
                return [reply for message in group for reply in self._answers([message])]
            if not isinstance(error, FedLoraError):
                logging.getLogger("fedlora").exception("a client raised what nobody expected")
            reason = f"{type(error).__name__}: {error}"
            replies = [Message(Error(FAILED, reason), reply_to=requests[0])]
        for reply in replies:
            reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        return replies

    def _explain(self, error: Exception) -> None:
        """Say once that clients train one by one, where it is the model that cannot train them together."""
        if isinstance(error, ApartError) and self._fuse != 1:
            warnings.warn(f"clients train one by one: {error}", stacklevel=2)
            self._fuse = 1

    def _delivered(self, message: Message) -> Message:
        """The message as the other side would read it: fresh records over the same immutable bytes."""
        content = RecordDict({name: _renewed(record) for name, record in message.content.items()})
        metadata = message.metadata
        copy = Message(
            content, metadata.dst_node_id, metadata.message_type, ttl=metadata.ttl, group_id=metadata.group_id
        )
        copy.metadata.__dict__["_message_id"] = metadata.message_id
        return copy


def _renewed(record: Record) -> Record:
    if isinstance(record, ArrayRecord):
        return ArrayRecord(dict(record))
    return MetricRecord(dict(record)) if isinstance(record, MetricRecord) else ConfigRecord(dict(record))
