"""Flower's Grid over clients whose state one process holds, and which of them are trained in one pass.

Messages of a round are grouped in the order they were sent, as many clients together as a target of tokens
and memory allows; groups follow config and data, so that a run's result does not depend on the machine, nor
on how many machines there are. Replies are made when they are asked for.
"""

import logging
import uuid
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import ApartError, ConfigError, FedLoraError
from fedlora.rounds.codec import FAILED

TOKENS = 16384  # of a step: about thirty groups of clients, one a core; more make it no faster
MEMORY = 512 * 2**20  # bytes of a group's adapters with their gradients and optimizer states
ON_A_GPU = 8 * 2**30  # there a pass over the model costs hardly more for many clients than for one
FIRST_NODE = 1000

Record = ArrayRecord | ConfigRecord | MetricRecord
Group = list[Message]


class SimulationGrid(Grid):
    """A federation whose nodes are objects of this process, wherever they train.

    Args:
        site: the clients' side.
        nodes: one config a node, as `--node-config` would give it: {"client": 3, "rank": 8}.
        fuse: clients that train together; None takes as many as fit a target of tokens and memory.
        done: called with the number of clients whenever some have finished.
        memory: bytes of a group's adapters with their gradients and optimizer states; None for `MEMORY`.
    """

    def __init__(
        self,
        site: ClientRuntime,
        nodes: Sequence[Mapping[str, int]],
        fuse: int | None = None,
        done: Callable[[int], None] = lambda clients: None,
        memory: int | None = None,
    ) -> None:
        self._site, self._fuse, self._done = site, fuse, done
        self._room = MEMORY if memory is None else memory
        self._run = FlowerRun.create_empty(run_id=1)
        identify()
        self._replies: dict[str, Message] = {}
        self._contexts = {
            FIRST_NODE + i: Context(1, FIRST_NODE + i, dict(node), RecordDict(), {})
            for i, node in enumerate(nodes)
        }

    @abstractmethod
    def answered(self, groups: Iterator[Group]) -> Iterator[tuple[Group, list[Message]]]:
        """Each group with the replies of its nodes, in any order; a group is asked for when it is needed."""

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
        """All nodes; none is ever away."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their replies wait for `pull_messages`."""
        sent: list[Message] = []

        def noted() -> Iterator[Message]:
            for message in messages:
                sent.append(message)
                yield message

        for reply in self.send_and_receive(noted()):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to these messages."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies, group by group; nothing is ever late here."""
        for group, replies in self.answered(self._groups(messages)):
            yield from replies
            if group[0].metadata.message_type == "train":
                self._done(len(group))

    def _groups(self, messages: Iterable[Message]) -> Iterator[Group]:
        """Training messages together, as many as fit; every other message alone."""
        group: Group = []
        tokens = memory = 0
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            one = self._cost(message)
            full = self._fuse is not None and len(group) >= self._fuse
            if self._fuse is None:
                full = bool(group) and (tokens + one[0] > TOKENS or memory + one[1] > self._room)
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
        whole = message.content.config_records["config"]["whole"]
        return self._site.step_tokens(self._context(message)), 4 * int(whole)  # type: ignore[arg-type]

    def _context(self, message: Message) -> Context:
        return self._contexts[message.metadata.dst_node_id]

    def _train_apart(self, error: ApartError) -> None:
        """Train clients one by one from now on, as the model cannot train them together; said once."""
        if self._fuse != 1:
            warnings.warn(f"clients train one by one: {error}", stacklevel=2)
            self._fuse = 1


def answer(
    site: ClientRuntime,
    group: Sequence[Message],
    contexts: Sequence[Context],
    apart: Callable[[ApartError], None],
) -> list[Message]:
    """The replies of a group's clients, trained in one pass; where that fails, each is tried alone.

    Args:
        site: the clients' side.
        group: messages of one kind.
        contexts: of the nodes that they go to.
        apart: takes the error of a model that cannot train clients together.
    """
    requests = [_delivered(message) for message in group]
    try:
        if group[0].metadata.message_type == "train":
            replies = site.train(requests, contexts)
        else:
            app = site.app()
            replies = [app(r, context) for r, context in zip(requests, contexts, strict=True)]
    except Exception as error:
        # One client's failure must not take its group's work with it.
        if len(group) > 1:
            if isinstance(error, ApartError):
                apart(error)
            pairs = zip(group, contexts, strict=True)
            return [reply for m, context in pairs for reply in answer(site, [m], [context], apart)]
        if not isinstance(error, FedLoraError):
            logging.getLogger("fedlora").exception("a client raised what nobody expected")
        replies = [failure(requests[0], f"{type(error).__name__}: {error}")]
    for reply in replies:
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return replies


def memory_of_group(site: ClientRuntime) -> int:
    """Bytes that a group may take, by the kind of the model's device."""
    return ON_A_GPU if site.base.device.type == "cuda" else MEMORY


def failure(message: Message, reason: str) -> Message:
    """The reply of a client that has failed."""
    return Message(Error(FAILED, reason), reply_to=message)


def identify() -> None:
    """Give this process the identity without which Flower makes no message."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def together(fuse: int | str) -> int | None:
    """How many clients train in one pass by the setting `engine.fuse`; None for as many as fit.

    Raises:
        ConfigError: neither auto nor a number.
    """
    if fuse == "auto":
        return None
    if isinstance(fuse, bool) or not isinstance(fuse, int) or fuse < 1:
        raise ConfigError(f"engine.fuse: expected auto or a whole number of at least 1, got {fuse!r}")
    return fuse


def _delivered(message: Message) -> Message:
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
