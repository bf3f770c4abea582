"""Secure aggregation: the sum comes out exactly or not at all, and nothing else does."""

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.secure_aggregation import crypto, protocol
from fedlora.secure_aggregation.crypto import KEY, Words
from fedlora.secure_aggregation.protocol import RECORD, threshold
from fedlora.secure_aggregation.secure_round import SecureRound

NODES = [2**63 + 9, 17, 5, 2**40, 2**62 + 1, 1, 99, 2**64 - 1]  # as Flower draws them, in no order
LENGTH = 9
STEPS = ["keys", "shares", "train", "unmask"]

Change = Callable[[str, int, RecordDict], RecordDict | None]


def travelled(content: RecordDict) -> RecordDict:
    """What the other side reads: fresh records out of the bytes on the wire."""
    kind = type(recorddict_to_proto(RecordDict()))
    return recorddict_from_proto(kind.FromString(recorddict_to_proto(content).SerializeToString()))


class Post:
    """A grid of clients whose messages and states travel as bytes, as if every one met a new process.

    Args:
        count: of clients.
        lost: what is never answered, by step.
        change: from step, node and a reply's content to what arrives; None for an error.
    """

    def __init__(self, count: int, lost: Mapping[str, Iterable[int]] | None = None) -> None:
        self.nodes = NODES[:count]
        self.lost = {step: {*(lost or {}).get(step, ())} for step in STEPS}
        self.change: Change = lambda step, node, content: content
        self.contexts = {n: Context(7, n, {}, RecordDict(), {}) for n in self.nodes}
        self.seen: list[str] = []
        self.app = ClientApp()
        for name, work in {
            "keys": protocol.keys,
            "shares": protocol.shares,
            "unmask": protocol.unmask,
        }.items():
            self.app.query(name)(work)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None) -> Iterator[Message]:
        assert timeout is not None
        for message in messages:
            node, step = message.metadata.dst_node_id, message.metadata.message_type.removeprefix("query.")
            if node in self.lost[step]:
                continue
            request = Message(travelled(message.content), node, message.metadata.message_type)
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            request.metadata.__dict__["_message_id"] = message.metadata.message_id
            try:
                content = travelled(self.app(request, self.context(node)).content)
            except IncompatibleUpdates as error:
                yield Message(Error(2, str(error)), reply_to=request)
                continue
            self.seen.append(step)
            changed = self.change(step, node, content)
            yield Message(Error(2, "no luck") if changed is None else changed, reply_to=request)

    def context(self, node: int) -> Context:
        context = self.contexts[node]
        context.state = travelled(context.state)
        return context

    def mask(self, node: int, vector: Words, attachment: ConfigRecord) -> Words:
        secure_record = travelled(RecordDict({RECORD: attachment})).config_records[RECORD]
        return protocol.mask(vector, secure_record, self.context(node))

    def deliver(self, server: SecureRound, vectors: Mapping[int, Words]) -> dict[int, Words]:
        """Open the round and let those mask their vectors that are in and not lost."""
        going = [n for n in server.open() if n not in self.lost["train"]]
        return {n: self.mask(n, vectors[n], server.attachment(n)) for n in going}


def numbers(nodes: Iterable[int]) -> dict[int, Words]:
    rng = np.random.default_rng(0)
    return {n: rng.integers(0, 2**64, LENGTH, dtype=np.uint64) for n in nodes}


def plain(vectors: Mapping[int, Words], nodes: Iterable[int]) -> list[int]:
    """The sum in Python's integers."""
    return [sum(int(vectors[n][i]) for n in nodes) % 2**64 for i in range(LENGTH)]


def delivered(post: Post, round: int = 1) -> tuple[SecureRound, dict[int, Words], dict[int, Words]]:
    server, vectors = SecureRound(post, post.nodes, round), numbers(post.nodes)
    return server, vectors, post.deliver(server, vectors)


def finished(post: Post, round: int = 1) -> tuple[SecureRound, dict[int, Words]]:
    """A whole round, whose sum must be right, and what was delivered."""
    server, vectors, masked = delivered(post, round)
    assert server.total(masked).tolist() == plain(vectors, masked)
    return server, masked


def chi_square(vector: Words) -> float:
    """Of the bytes against the uniform distribution; 255 degrees of freedom, so beyond 400 once in 10^8."""
    counts = np.bincount(np.frombuffer(vector.tobytes(), np.uint8), minlength=256)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_is_exact_whoever_vanishes_at_each_step(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, lost, least = NODES[:count], {}, 3
    for step in STEPS:
        gone = rng.permutation(len(left))[: rng.integers(0, len(left) - least + 1)]
        lost[step] = [left[i] for i in gone]
        left = [n for n in left if n not in lost[step]]
        least = threshold(len(left)) if step == "keys" else least
    server, _ = finished(Post(count, lost))
    assert server.dropped.keys() == {n for step in STEPS for n in lost[step] if step != "train"}


@pytest.mark.parametrize("step", STEPS)
def test_as_many_may_vanish_as_leave_the_threshold(step: str) -> None:
    spare = 7 - (3 if step == "keys" else threshold(7))
    finished(Post(7, {step: NODES[1 : 1 + spare]}))
    gone = NODES[: 1 + spare]
    with pytest.raises(IncompatibleUpdates, match=rf"{7 - spare} clients are needed.* {6 - spare} did"):
        finished(Post(7, {step: gone}))


def test_the_threshold_is_more_than_two_thirds() -> None:
    assert [threshold(n) for n in range(3, 11)] == [3, 3, 4, 5, 5, 6, 7, 7]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_clients_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        SecureRound(Post(count), NODES[:count], 1).open()


def test_a_masked_vector_is_uniform_and_new_every_round() -> None:
    post = Post(3)
    zeros = dict.fromkeys(post.nodes, np.zeros(8192, np.uint64))
    first, second = (post.deliver(SecureRound(post, post.nodes, r), zeros) for r in (1, 2))
    for node in post.nodes:
        for vector in (first[node], second[node], first[node] - second[node]):
            assert chi_square(vector) < 400
    assert chi_square(first[17] - first[5]) < 400
    assert all(not vector.any() for vector in zeros.values())  # what is masked is a copy


def test_a_tampered_letter_makes_its_receiver_drop_out_and_not_the_sum_wrong() -> None:
    post = Post(4)
    server, vectors, masked = SecureRound(post, post.nodes, 1), numbers(post.nodes), {}
    for node in server.open():
        record = server.attachment(node)
        if node == NODES[1]:
            letters = list(record["letters"])
            for wrong in ([bytes([letters[0][0] ^ 1]) + letters[0][1:], *letters[1:]], letters[::-1]):
                with pytest.raises(IncompatibleUpdates, match="changed on their way"):
                    post.mask(node, vectors[node], ConfigRecord({**record, "letters": wrong}))
            continue
        masked[node] = post.mask(node, vectors[node], record)
    assert server.total(masked).tolist() == plain(vectors, masked)


def first(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A change of the first node's replies: from the record as a dict to a dict, a content or None."""

    def make(step: str, node: int, content: RecordDict) -> RecordDict | None:
        if node != NODES[0]:
            return content
        changed = change(dict(content.config_records[RECORD]))
        return RecordDict({RECORD: ConfigRecord(changed)}) if type(changed) is dict else changed

    return make


HOSTILE: dict[str, Change] = {
    "error": first(lambda record: None),
    "empty": first(lambda record: RecordDict()),
    "another kind": first(lambda record: RecordDict({RECORD: MetricRecord({"round": 1})})),
    "more": first(lambda record: RecordDict({RECORD: ConfigRecord(record), "more": ArrayRecord()})),
    "empty bytes": first(lambda record: {**record, "more": b""}),
    "no round": first(lambda record: {k: v for k, v in record.items() if k != "round"}),
    "another round": first(lambda record: {**record, "round": 2}),
    "a round that is a list": first(lambda record: {**record, "round": [1]}),
    "another name": first(lambda record: {k.replace("e", "x"): v for k, v in record.items()}),
    "one item less": first(lambda record: {k: v[:-1] if k != "round" else v for k, v in record.items()}),
    "one item more": first(lambda r: {k: [*v, v[0]] if k != "round" else v for k, v in r.items()}),
    "a byte more": first(lambda r: {k: [x + b"x" for x in v] if k != "round" else v for k, v in r.items()}),
}
for wrong in ([], b"x" * 64, "text", [1, 2], [b"x"], [b""] * 4, [1.0], ["s" * 64], 3.5, True):
    HOSTILE[repr(wrong)] = first(lambda r, wrong=wrong: dict.fromkeys(r, wrong) | {"round": 1})


@pytest.mark.parametrize("step", ["keys", "shares", "unmask"])
@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_malformed_reply_drops_its_client(step: str, change: Change) -> None:
    post = Post(4)
    post.change = lambda at, node, content: change(at, node, content) if at == step else content
    server, masked = finished(post)
    assert server.dropped.keys() == {NODES[0]}
    assert server.dropped[NODES[0]].startswith(step)
    assert len(masked) == (4 if step == "unmask" else 3)


@pytest.mark.parametrize("key", [bytes(KEY), bytes([1]) + bytes(KEY - 1)])
@pytest.mark.parametrize("half", [0, 1])
def test_a_key_of_small_order_drops_its_client(key: bytes, half: int) -> None:
    other = crypto.public(crypto.new_key())
    post = Post(4)
    keys = [key + other if half == 0 else other + key]
    post.change = first(lambda record: {**record, "keys": keys} if "keys" in record else record)
    server, _, masked = delivered(post)
    assert masked.keys() == {*NODES[1:4]}
    assert "small order" in server.dropped[NODES[0]]


def test_clients_with_the_same_keys_are_dropped() -> None:
    post = Post(5)
    same = [crypto.public(crypto.new_key()) + crypto.public(crypto.new_key())]

    def change(step: str, node: int, content: RecordDict) -> RecordDict:
        if step == "keys" and node in NODES[:2]:
            return RecordDict({RECORD: ConfigRecord({"round": 1, "keys": same})})
        return content

    post.change = change
    server, _, masked = delivered(post)
    assert masked.keys() == {*NODES[2:5]}
    assert server.dropped.keys() == {*NODES[:2]}


def test_second_replies_and_those_of_strangers_are_ignored() -> None:
    class Loud(Post):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None) -> Any:
            for reply in super().send_and_receive(messages, timeout=timeout):
                yield reply
                yield reply
                for node in (reply.metadata.src_node_id, 12345):
                    asked = Message(RecordDict(), node, "query.keys")
                    asked.metadata.__dict__["_message_id"] = "m"
                    yield Message(Error(2, "again"), reply_to=asked)

    server, _ = finished(Loud(4))
    assert server.dropped == {}


@pytest.mark.parametrize("member", [NODES[1], NODES[3]])
@pytest.mark.parametrize("byte", [0, 40])
def test_a_wrong_share_of_whomever_is_noticed(member: int, byte: int) -> None:
    post = Post(5, {"train": [NODES[3]]})
    server, _, masked = delivered(post)
    place = sorted(post.nodes).index(member)

    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        found = record["shares"]
        spoiled = found[place][:byte] + bytes([found[place][byte] ^ 1]) + found[place][byte + 1 :]
        return {**record, "shares": [*found[:place], spoiled, *found[place + 1 :]]}

    post.change = first(spoil)
    with pytest.raises(IncompatibleUpdates, match=f"do not give the secret of node {member}"):
        server.total(masked)


def test_vectors_that_do_not_belong_together_reveal_nothing() -> None:
    post = Post(4, {"shares": [NODES[3]]})
    server, _, masked = delivered(post)
    other = next(iter(masked))
    short, signed = masked[other][:1], masked[other].view(np.int64)
    for wrong in ({**masked, NODES[3]: masked[other]}, {**masked, other: short}, {**masked, other: signed}):
        with pytest.raises(IncompatibleUpdates, match="expected uint64 vectors of one length"):
            server.total(wrong)
    assert "unmask" not in post.seen


def test_nothing_is_left_of_a_round_and_the_next_one_works() -> None:
    post = Post(4, {"train": [NODES[3]]})
    for round in (1, 2, 2):  # a resumed run does a round again
        server, masked = finished(post, round)
        left = [n for n in post.nodes if RECORD in post.contexts[n].state]
        assert left == [NODES[3]]  # until the next round
        with pytest.raises(IncompatibleUpdates, match="3 clients are needed that reveal shares, 0 did"):
            server.total(masked)


def test_the_bytes_of_every_step_are_counted() -> None:
    server, _ = finished(Post(8))
    assert {*server.bytes_down} == {*server.bytes_up} == {*NODES}
    assert 0 < server.bytes_down[17] < 1500
    assert 1000 < server.bytes_up[17] < 2000
