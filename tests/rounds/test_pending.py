"""Which node a reply is of, in the order of sending and in any other."""

from flwr.app import Message, RecordDict

from fedlora.rounds.pending import PendingMessages


def sent(asked: PendingMessages, node: int, name: str | None) -> Message:
    message = asked.note(Message(RecordDict(), node, "train"))
    if name is not None:
        message.metadata.__dict__["_message_id"] = name
    return message


def reply_to(message: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def test_replies_are_known_in_any_order_and_past_messages_that_were_never_sent() -> None:
    asked = PendingMessages()
    first, _lost, third = (sent(asked, node, name) for node, name in ((7, "a"), (8, None), (9, "c")))
    assert asked.node(reply_to(third)) == 9
    assert asked.node(reply_to(first)) == 7
    late = sent(asked, 10, None)
    late.metadata.__dict__["_message_id"] = "d"  # a grid gives ids when it sends
    assert asked.node(reply_to(late)) == 10
    assert asked.node(reply_to(third)) == 9


def test_what_nobody_asked_for_is_nobody_s() -> None:
    asked = PendingMessages()
    sent(asked, 7, "a")
    assert asked.node(reply_to(sent(PendingMessages(), 7, "elsewhere"))) is None


def test_ten_thousand_replies_look_at_each_message_once(monkeypatch) -> None:
    asked, looked = PendingMessages(), []
    take = PendingMessages._take
    monkeypatch.setattr(
        PendingMessages, "_take", lambda self, message: (looked.append(1), take(self, message))
    )
    messages = [sent(asked, node, None) for node in range(1, 10_001)]
    for at, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = str(at)
        assert asked.node(reply_to(message)) == message.metadata.dst_node_id
    assert len(looked) == len(messages)
