"""A Grid that does not wait for stragglers, around Flower's own for a real network or a cluster."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedlora.errors import FedLoraError


class PollingGrid(Grid):
    """Another grid, asked often for replies, and no longer than a round needs them.

    Args:
        grid: the one that carries the messages.
        enough: from the number of clients that train to how many good replies a round waits for.
        poll: seconds between two looks for replies.
        done: called with 1 whenever a client has finished training.
        late: takes a line for the user about every reply that comes after its round.
        stopped: whether nobody will answer any more.
    """

    def __init__(
        self,
        grid: Grid,
        enough: Callable[[int], int],
        poll: float = 0.5,
        done: Callable[[int], None] = lambda clients: None,
        late: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._grid, self._enough, self._poll, self._done, self._late = grid, enough, poll, done, late
        self._stopped = stopped
        self.called: Callable[[int], str] = lambda node: f"node {node}"  # what messages call it
        self._missed: dict[str, tuple[int, str]] = {}  # message -> node and round of those not waited for

    @property
    def busy(self) -> set[int]:
        """Nodes that still work on what nobody waits for any more."""
        return {node for node, _ in self._missed.values()}

    def set_run(self, run: Run) -> None:
        """Take another run's identity."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._grid.run

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
        """The nodes that are connected now."""
        self._look_back()
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, one at a time, so that one is in memory at a time."""
        return [sent for message in messages for sent in self._grid.push_messages([message])]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to these messages that are there."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they come, until those that are needed have come.

        Whoever has not answered training by then is busy until its reply, which is thrown away, or an error
        in its place has come.
        """
        waiting: dict[str, tuple[int, str]] = {}
        training = 0
        for message in messages:
            kind, to = message.metadata.message_type, message.metadata.dst_node_id
            training += kind == "train"
            waiting |= dict.fromkeys(self.push_messages([message]), (to, message.metadata.group_id))
        waiting.pop(None, None)  # type: ignore[call-overload]  # what the SuperLink did not take
        wanted = self._enough(training) if training else len(waiting)
        until = None if timeout is None else time.monotonic() + timeout
        while waiting and wanted > 0 and (until is None or time.monotonic() < until):
            replies = list(self.pull_messages(list(waiting)))
            for reply in replies:
                waiting.pop(reply.metadata.reply_to_message_id, None)
                wanted -= not (training and reply.has_error())
                if training:
                    self._done(1)
                yield reply
            if self._stopped():
                raise FedLoraError("the run was stopped while clients trained; resume goes on")
            if not replies:
                time.sleep(self._poll)
        if training:
            self._missed |= waiting

    def _look_back(self) -> None:
        """Throw away what came after its round."""
        for reply in self._grid.pull_messages(list(self._missed)) if self._missed else ():
            node, round = self._missed.pop(reply.metadata.reply_to_message_id)
            what = f"failed: {reply.error.reason}" if reply.has_error() else "came after its round"
            self._late(f"round {round}: the reply of {self.called(node)} was thrown away, it {what}")
