"""Secure aggregation: a server that follows the protocol learns the sum of its clients' vectors and no other.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017
(https://doi.org/10.1145/3133956.3133982), the variant for a server that is honest but curious: no signatures.

1. keys: every client makes two fresh key pairs, one for letters to other clients and one for masks.
2. shares: every client draws the seed of its self-mask, and sends each client a share of it and of its mask
   key, in a letter that the server cannot open.
3. The client trains, and sends its vector plus its self-mask, plus or minus a mask with each other client.
   Masks of pairs cancel in the sum of all.
4. unmask: clients reveal shares of the seeds of those who delivered a vector, and of the mask keys of those
   who did not, whose pairwise masks are left in the sum.

Seed and mask key of one client would uncover its vector, so nobody reveals shares of both. Of the n clients
that sent keys, t = floor(2n/3) + 1 must stay to the end; the server and up to t - 1 clients that work with it
learn only the sum of the others' vectors. What a client has to keep is in `Context.state`, as every message
may find another process.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.rounds.codec import size
from fedlora.rounds.pending import PendingMessages
from fedlora.secure_aggregation import crypto
from fedlora.secure_aggregation.crypto import KEY, SHARE, Words, derive, public

Wanted = Mapping[str, tuple[int, int]]  # of each list in a reply: how many items, of how many bytes

RECORD = "secure"  # the record's name in every message and in a client's state
LEAST = 3  # of two clients each knows the other's vector from the sum
LETTER = 2 * SHARE + crypto.NONCE + crypto.TAG  # bytes
PATIENCE = 600.0  # seconds for an answer that takes milliseconds; without, Flower waits for half a day


def threshold(clients: int) -> int:
    """How many of the clients that sent keys must stay to the end, t of the paper: more than two thirds."""
    return 2 * clients // 3 + 1


def keys(message: Message, context: Context) -> Message:
    """Reply to "query.keys" with two fresh public keys; whatever is left of an earlier round is deleted."""
    round, channel, mask = message.content.config_records[RECORD]["round"], crypto.new_key(), crypto.new_key()
    context.state[RECORD] = ConfigRecord({"step": "keys", "round": round, "channel": channel, "mask": mask})
    return _reply(message, {"round": round, "keys": [public(channel) + public(mask)]})


def shares(message: Message, context: Context) -> Message:
    """Reply to "query.shares" with a letter for every client, this one included: shares of seed and mask key.

    Raises:
        IncompatibleUpdates: this client is not at that step of the round, fewer than 3 clients take part,
            their keys are not all different, or this client's are not those that it sent.
    """
    asked: dict[str, Any] = dict(message.content.config_records[RECORD])
    held, me = _held(asked, context, "keys"), context.node_id
    peers, count = dict(zip(asked["nodes"], asked["keys"], strict=True)), len(asked["nodes"])
    if peers.get(me) != public(held["channel"]) + public(held["mask"]):
        raise IncompatibleUpdates(f"expected the keys that node {me} sent among those of the round")
    if not LEAST <= count == len(peers) == len({*peers.values()}):
        raise IncompatibleUpdates(f"expected keys of at least {LEAST} clients, all different, got {count}")
    seed = os.urandom(KEY)
    halves = [crypto.split(secret, threshold(count), count) for secret in (seed, held["mask"])]
    letters = [
        crypto.seal(held["channel"], key[:KEY], of_seed + of_mask, _route(context, held["round"], me, node))
        for (node, key), of_seed, of_mask in zip(peers.items(), *halves, strict=True)
    ]
    context.state[RECORD] = ConfigRecord({**asked, **held, "step": "shares", "seed": seed})
    commitment = derive(seed, "commitment")
    return _reply(message, {"round": held["round"], "letters": letters, "commitment": [commitment]})


def mask(vector: Words, secure: ConfigRecord, context: Context) -> Words:
    """The vector that a client may send, from the one to be summed; once a round.

    From here on the client keeps only the shares that it was given: what its masks are made of is deleted.

    Args:
        vector: uint64 of shape (length,), the same length for all clients.
        secure: the record `RECORD` of the training message, as `SecureRound.attachment` made it.
        context: the client's.

    Raises:
        IncompatibleUpdates: this client has sent a vector in this round or is not part of it, fewer clients
            than the threshold are in, or a letter is not as it was sent.
    """
    sent: dict[str, Any] = dict(secure)
    held, me, members = _held(sent, context, "shares"), context.node_id, sent["nodes"]
    peers, round = dict(zip(held["nodes"], held["keys"], strict=True)), held["round"]
    least = threshold(len(peers))
    if not {me} <= {*members} <= peers.keys() or not least <= len(members) == len({*members}):
        raise IncompatibleUpdates(
            f"expected at least {least} nodes of {[*peers]}, {me} included, got {members}"
        )
    pairs = [
        crypto.unseal(held["channel"], peers[node][:KEY], letter, _route(context, round, node, me))
        for node, letter in zip(members, sent["letters"], strict=True)
    ]
    masked = vector.astype(np.uint64, casting="no")  # a copy; raises for any other type
    masked += crypto.self_mask(held["seed"], round, len(masked))
    for peer in {*members} - {me}:
        masked += crypto.pairwise_mask(held["mask"], peers[peer][KEY:], me, peer, round, len(masked))
    kept = {"step": "masked", "round": round, "least": least, "nodes": members, "pairs": pairs}
    context.state[RECORD] = ConfigRecord(kept)
    return masked


def unmask(message: Message, context: Context) -> Message:
    """Reply to "query.unmask" with a share of each client's secret: survivors' seeds, the others' mask keys.

    What is left of the round is deleted with it, so that there cannot be a second reply.

    Raises:
        IncompatibleUpdates: this client has not sent a vector or has replied before, or the survivors are not
            clients of the round, lack this one, or are fewer than the threshold.
    """
    asked: dict[str, Any] = dict(message.content.config_records[RECORD])
    held, me, survivors = _held(asked, context, "masked"), context.node_id, {*asked["survivors"]}
    members, least = held["nodes"], held["least"]
    if not {me} <= survivors <= {*members} or len(survivors) < least:
        raise IncompatibleUpdates(
            f"expected at least {least} survivors of nodes {members}, {me} included, got {sorted(survivors)}"
        )
    del context.state[RECORD]
    pairs = zip(members, held["pairs"], strict=True)
    chosen = [pair[:SHARE] if node in survivors else pair[SHARE:] for node, pair in pairs]
    return _reply(message, {"round": held["round"], "shares": chosen})


class SecureRound:
    """The server's side of one round; `open` it, send the attachments, ask for the `total`.

    Args:
        grid: how clients are reached.
        nodes: who is asked to take part.
        round: the round, from 1.

    Attributes:
        dropped: why a node stopped taking part; one that had delivered its vector still counts in the sum.
        bytes_down: to each node, besides its training message.
        bytes_up: from each node, besides its vector; replies that were of use.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int], round: int) -> None:
        self.dropped: dict[int, str] = {}
        self.bytes_down: Counter[int] = Counter()
        self.bytes_up: Counter[int] = Counter()
        self._grid, self._nodes, self._round = grid, sorted(nodes), round
        self._keys: dict[int, bytes] = {}  # of all that have shares: the channel's, then the mask's
        self._in: dict[int, dict[str, list[bytes]]] = {}  # letters and commitment of all that are in

    def open(self) -> list[int]:
        """Exchange keys and shares; the nodes that are in, in the order of their ids.

        Raises:
            ConfigError: fewer than 3 nodes.
            IncompatibleUpdates: too few of them are left; says how many are needed.
        """
        if len(self._nodes) < LEAST:
            raise ConfigError(
                f"secure aggregation: expected at least {LEAST} clients a round, got {len(self._nodes)}, and "
                "of two each knows the other's update from the sum; sample more clients"
            )
        sent = self._ask("keys", self._nodes, {}, {"keys": (1, 2 * KEY)})
        times = Counter(reply["keys"][0] for reply in sent.values())
        for node, reply in sent.items():
            pair = reply["keys"][0]
            if times[pair] == 1 and crypto.usable(pair[:KEY]) and crypto.usable(pair[KEY:]):
                self._keys[node] = pair
            else:  # with it, the honest clients would refuse the round
                self.dropped[node] = "keys: expected keys of its own, not of small order"
        nodes, count = [*self._keys], len(self._keys)
        self._enough(count, LEAST, "send keys")
        wanted = {"letters": (count, LETTER), "commitment": (1, KEY)}
        self._in = self._ask("shares", nodes, {"nodes": nodes, "keys": [*self._keys.values()]}, wanted)
        self._enough(len(self._in), threshold(count), "send shares")
        return [*self._in]

    def attachment(self, node: int) -> ConfigRecord:
        """What a node that is in needs to mask its vector: the record `RECORD` of its training message."""
        place = [*self._keys].index(node)
        letters = [found["letters"][place] for found in self._in.values()]
        return ConfigRecord({"round": self._round, "nodes": [*self._in], "letters": letters})

    def total(self, vectors: Mapping[int, Words]) -> Words:
        """The sum mod 2^64 of the vectors, without their masks; once a round.

        Args:
            vectors: by node, those that were delivered, uint64 of one shape (length,).

        Raises:
            IncompatibleUpdates: vectors of nodes that are not in, or of different kinds; too few vectors or
                replies, with how many are needed; shares that do not give the secret that they are of.
        """
        survivors, least = sorted(vectors), threshold(len(self._keys))
        self._enough(len(survivors), least, "deliver a vector")
        kinds, length = {(str(v.dtype), v.shape) for v in vectors.values()}, len(vectors[survivors[0]])
        if not vectors.keys() <= self._in.keys() or kinds != {("uint64", (length,))}:
            raise IncompatibleUpdates(
                f"expected uint64 vectors of one length of nodes in {[*self._in]}, got {kinds} of {survivors}"
            )
        found = self._ask("unmask", survivors, {"survivors": survivors}, {"shares": (len(self._in), SHARE)})
        self._enough(len(found), least, "reveal shares")
        places = [*self._keys]
        few = {places.index(node): found[node]["shares"] for node in [*found][:least]}  # more is slower
        total: Words = reduce(np.add, vectors.values())
        for i, member in enumerate(self._in):
            secret = self._secret(member, {place: of[i] for place, of in few.items()}, member in vectors)
            if member in vectors:
                total -= crypto.self_mask(secret, self._round, length)
                continue
            for node in survivors:
                key = self._keys[node][KEY:]
                total -= crypto.pairwise_mask(secret, key, node, member, self._round, length)
        return total

    def _secret(self, member: int, shares: Mapping[int, bytes], delivered: bool) -> bytes:
        """A client's seed if it delivered, else its mask key; checked against what the client has sent."""
        known = self._in[member]["commitment"][0] if delivered else self._keys[member][KEY:]
        with suppress(ValueError):  # of a padding or a length
            secret = crypto.join(shares)
            if known == (derive(secret, "commitment") if delivered else public(secret)):
                return secret
        raise IncompatibleUpdates(
            f"secure aggregation, round {self._round}: shares do not give the secret of node {member}, so a "
            "client has sent a wrong one and the sum cannot be known; the round has to be done again"
        )

    def _ask(
        self, what: str, nodes: Sequence[int], question: Mapping[str, Any], wanted: Wanted
    ) -> dict[int, dict[str, list[bytes]]]:
        """The first reply of each node, in their order; who sends none, or not what is wanted, is dropped."""
        record = RecordDict({RECORD: ConfigRecord({"round": self._round, **question})})
        self.bytes_down.update(dict.fromkeys(nodes, size(record)))
        asked, found, waiting = PendingMessages(), dict[int, dict[str, list[bytes]]](), {*nodes}
        sent = [asked.note(Message(record, n, f"query.{what}", group_id=str(self._round))) for n in nodes]
        for reply in self._grid.send_and_receive(sent, timeout=PATIENCE):
            if (node := asked.node(reply)) is None or node not in waiting:
                continue
            waiting.remove(node)
            try:
                found[node] = _read(reply, self._round, wanted)
                self.bytes_up[node] += size(reply.content)
            except IncompatibleUpdates as error:
                self.dropped[node] = f"{what}: {error}"
        self.dropped |= dict.fromkeys(waiting, f"{what}: no reply")
        return dict(sorted(found.items()))

    def _enough(self, count: int, least: int, what: str) -> None:
        if count < least:
            raise IncompatibleUpdates(
                f"secure aggregation, round {self._round}: {least} clients are needed that {what}, "
                f"{count} did; dropped: {self.dropped}"
            )


def _read(reply: Message, round: int, wanted: Wanted) -> dict[str, Any]:
    """What a client replied: lists of as many items, of as many bytes, as wanted, and nothing else."""
    if reply.has_error():
        raise IncompatibleUpdates(f"the client failed: {reply.error.reason}")
    record: dict[str, Any] = dict(reply.content.config_records.get(RECORD, {}))
    current = record.pop("round", None) == round and len(reply.content) == 1
    lengths = {name: _lengths(value) for name, value in record.items()}
    if not current or lengths != {name: [length] * count for name, (count, length) in wanted.items()}:
        raise IncompatibleUpdates(f"expected of round {round} so many items of so many bytes: {wanted}")
    return record


def _lengths(value: Any) -> list[int]:
    return [len(item) for item in value if isinstance(item, bytes)] if isinstance(value, list) else []


def _held(asked: Mapping[str, Any], context: Context, step: str) -> dict[str, Any]:
    """A client's own record, which must be of the round that is asked about and of the step before."""
    held: dict[str, Any] = dict(context.state.config_records.get(RECORD, {}))
    if (held.get("step"), held.get("round")) != (step, asked["round"]):
        raise IncompatibleUpdates(
            f"secure aggregation: expected node {context.node_id} to be after step '{step}' of round "
            f"{asked['round']}, it is after '{held.get('step')}' of {held.get('round')}; a step is done once"
        )
    return held


def _route(context: Context, round: int, sender: int, receiver: int) -> str:
    """What a letter is bound to."""
    return f"run {context.run_id}, round {round}, from node {sender} to node {receiver}"


def _reply(message: Message, content: Mapping[str, Any]) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord(dict(content))}), reply_to=message)
