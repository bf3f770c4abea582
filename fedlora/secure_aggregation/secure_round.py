"""The server's side of secure aggregation: it exchanges keys and shares, and removes the masks from the sum.

The protocol and the clients' side are in `protocol.py`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import ConfigError, IncompatibleUpdates
from fedlora.rounds.codec import size
from fedlora.rounds.pending import PendingMessages
from fedlora.secure_aggregation import crypto
from fedlora.secure_aggregation.crypto import KEY, SHARE, Words, derive, public
from fedlora.secure_aggregation.protocol import LEAST, RECORD, threshold

Add = Callable[[Mapping[int, Words]], Words]  # the sum mod 2^64 of the vectors of some nodes
Wanted = Mapping[str, tuple[int, int]]  # name of a list in a reply -> number of items, bytes of an item

LETTER = 2 * SHARE + crypto.NONCE + crypto.TAG  # bytes of two encrypted shares
PATIENCE = 600.0  # seconds to wait for an answer; Flower's default is half a day


class SecureRound:
    """The server's side of one round: call `open`, send each node its `attachment`, then call `total`.

    Args:
        grid: carries messages to the nodes.
        nodes: the nodes that are asked to take part.
        round: the round, from 1.

    Attributes:
        dropped: node -> why it stopped taking part. A node that had delivered its vector is still in the sum.
        bytes_down: bytes to each node, without its training message.
        bytes_up: bytes of the valid replies of each node, without its vector.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int], round: int) -> None:
        self.dropped: dict[int, str] = {}
        self.bytes_down: Counter[int] = Counter()
        self.bytes_up: Counter[int] = Counter()
        self._grid, self._nodes, self._round = grid, sorted(nodes), round
        self._keys: dict[int, bytes] = {}  # node -> public channel key, then public mask key
        self._in: dict[int, dict[str, list[bytes]]] = {}  # member -> encrypted shares and commitment

    def open(self) -> list[int]:
        """Exchange keys and shares, and return the members of the round in the order of their ids.

        Raises:
            ConfigError: there are fewer than 3 nodes.
            IncompatibleUpdates: too few nodes answered; the message says how many are needed.
        """
        if len(self._nodes) < LEAST:
            raise ConfigError(
                f"secure aggregation: expected at least {LEAST} clients a round, got {len(self._nodes)}; one "
                "of two could compute the other's update from the sum; sample more clients"
            )
        sent = self._ask("keys", self._nodes, {}, {"keys": (1, 2 * KEY)})
        times = Counter(reply["keys"][0] for reply in sent.values())
        for node, reply in sent.items():
            pair = reply["keys"][0]
            if times[pair] == 1 and crypto.usable(pair[:KEY]) and crypto.usable(pair[KEY:]):
                self._keys[node] = pair
            else:  # honest clients would refuse a round with such keys
                self.dropped[node] = (
                    "keys: expected keys that no other client sent and that are not of small order"
                )
        nodes, count = [*self._keys], len(self._keys)
        self._enough(count, LEAST, "send keys")
        wanted = {"letters": (count, LETTER), "commitment": (1, KEY)}
        self._in = self._ask("shares", nodes, {"nodes": nodes, "keys": [*self._keys.values()]}, wanted)
        self._enough(len(self._in), threshold(count), "send shares")
        return [*self._in]

    def attachment(self, node: int) -> ConfigRecord:
        """What a member needs to mask its vector: the record `RECORD` of its training message."""
        place = [*self._keys].index(node)
        letters = [found["letters"][place] for found in self._in.values()]
        return ConfigRecord({"round": self._round, "nodes": [*self._in], "letters": letters})

    def total(self, vectors: Mapping[int, Words], add: Add | None = None) -> Words:
        """The sum of the vectors mod 2^64 without the masks, (length,). It can be called once in a round.

        Args:
            vectors: node -> the masked vector that it delivered, uint64, (length,).
            add: adds them up on their way here; None adds them here.

        Raises:
            IncompatibleUpdates: vectors are of nodes that are no members or differ in dtype or length; there
                are too few vectors or replies; or shares do not reconstruct the secret of a member.
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
        few = {
            places.index(node): found[node]["shares"] for node in [*found][:least]
        }  # more shares would take longer
        total: Words = add(vectors) if add else reduce(np.add, vectors.values())
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
        """A member's seed if it delivered, else its mask key; verified by its commitment or public key."""
        known = self._in[member]["commitment"][0] if delivered else self._keys[member][KEY:]
        with suppress(ValueError):  # the padding or the length is wrong
            secret = crypto.join(shares)
            if known == (derive(secret, "commitment") if delivered else public(secret)):
                return secret
        raise IncompatibleUpdates(
            f"secure aggregation, round {self._round}: shares do not give the secret of node {member}: a "
            "client has sent a wrong share, so the sum cannot be computed; repeat the round"
        )

    def _ask(
        self, what: str, nodes: Sequence[int], question: Mapping[str, Any], wanted: Wanted
    ) -> dict[int, dict[str, list[bytes]]]:
        """The first reply of each node, by node; a node without a valid reply is dropped."""
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
    """The lists in a reply, which must have the wanted numbers of items and bytes, and nothing else."""
    if reply.has_error():
        raise IncompatibleUpdates(f"the client failed: {reply.error.reason}")
    record: dict[str, Any] = dict(reply.content.config_records.get(RECORD, {}))
    current = record.pop("round", None) == round and len(reply.content) == 1
    lengths = {name: _lengths(value) for name, value in record.items()}
    if not current or lengths != {name: [length] * count for name, (count, length) in wanted.items()}:
        raise IncompatibleUpdates(f"expected a reply of round {round} with lists of (items, bytes) {wanted}")
    return record


def _lengths(value: Any) -> list[int]:
    return [len(item) for item in value if isinstance(item, bytes)] if isinstance(value, list) else []
