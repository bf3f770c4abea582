"""Messages that wait for a reply, and which of them a reply answers."""

from collections import deque

from flwr.app import Message

SUPERLINK = 1  # the node id under which a SuperLink replies for nodes that do not


class PendingMessages:
    """Finds the node of a reply; where a SuperLink reports an error of a node, it is itself the sender."""

    def __init__(self) -> None:
        self._open: deque[Message] = deque()
        self._nodes: dict[str, int] = {}

    def note(self, message: Message) -> Message:
        """Remember a message that is about to be sent, and hand it back; a grid gives it its id later."""
        self._open.append(message)
        return message

    def node(self, reply: Message) -> int | None:
        """The node whose message this answers; None if nobody asked for it, or another node answers.

        Only an error may come from another sender, which is the SuperLink.
        """
        if reply.metadata.reply_to_message_id not in self._nodes:
            self._learn(reply.metadata.reply_to_message_id)
        node = self._nodes.get(reply.metadata.reply_to_message_id)
        senders = (node, SUPERLINK) if reply.has_error() else (node,)
        return node if reply.metadata.src_node_id in senders else None

    def _learn(self, wanted: str) -> None:
        """Note the ids that the grid has given to messages since.

        They are given in the order of sending as a rule, so all messages are searched only if that fails.
        """
        while self._open and self._open[0].metadata.message_id:
            self._take(self._open.popleft())
        if wanted not in self._nodes:
            for message in self._open:
                self._take(message)

    def _take(self, message: Message) -> None:
        if message.metadata.message_id:
            self._nodes[message.metadata.message_id] = message.metadata.dst_node_id
