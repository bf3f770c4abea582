"""Secure aggregation's clients without a server: what they send, keep, delete and refuse."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedlora.errors import IncompatibleUpdates
from fedlora.secure_aggregation import crypto, protocol
from fedlora.secure_aggregation.crypto import KEY, SHARE
from fedlora.secure_aggregation.protocol import RECORD, threshold

NODES = [5, 17, 99, 2**40, 2**63 + 9]
LENGTH = 8192


class Clients:
    """Clients by node, after a step of a round.

    Args:
        step: "keys", "shares" or "mask".
        nodes: their ids, in order.
        run: its id.
        round: the round.
    """

    def __init__(self, step: str, nodes: list[int] = NODES, run: int = 7, round: int = 1) -> None:
        self.round, self.contexts = round, {n: Context(run, n, {}, RecordDict(), {}) for n in nodes}
        self.vectors = {n: np.arange(LENGTH, dtype=np.uint64) for n in nodes}
        keys = [self.ask(protocol.keys, n)["keys"][0] for n in nodes]
        self.peers: dict[str, Any] = {"nodes": nodes, "keys": keys}
        if step == "keys":
            return
        self.sent = {n: self.ask(protocol.shares, n, **self.peers) for n in nodes}
        self.secrets = {n: self.held(n) for n in nodes}
        if step == "mask":
            self.masked = {n: self.mask(n) for n in nodes}

    def ask(self, work: Any, node: int, **content: Any) -> dict[str, Any]:
        """The content of a reply."""
        record = ConfigRecord({"round": self.round, **content})
        asked = Message(RecordDict({RECORD: record}), node, "query.any")
        asked.metadata.__dict__["_message_id"] = "m"
        return dict(work(asked, self.contexts[node]).content.config_records[RECORD])

    def mask(self, node: int, **change: Any) -> Any:
        nodes = self.peers["nodes"]
        letters = [self.sent[n]["letters"][nodes.index(node)] for n in nodes]
        record = ConfigRecord({"round": self.round, "nodes": nodes, "letters": letters, **change})
        return protocol.mask(self.vectors[node], record, self.contexts[node])

    def held(self, node: int) -> dict[str, Any]:
        return dict(self.contexts[node].state.config_records.get(RECORD, {}))


def chi_square(vector: Any) -> float:
    """Of the bytes against the uniform distribution; 255 degrees of freedom, so beyond 400 once in 10^8."""
    counts = np.bincount(np.frombuffer(vector.tobytes(), np.uint8), minlength=256)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def blobs(records: Mapping[Any, Mapping[str, Any]]) -> bytes:
    """All bytes of some records."""
    values = [v for record in records.values() for v in record.values()]
    return b"|".join(x for v in values for x in (v if isinstance(v, list) else [v]) if isinstance(x, bytes))


def test_who_lacks_one_of_a_client_s_secrets_sees_noise() -> None:
    clients = Clients("mask", NODES[:3])
    me, held = 17, clients.secrets[17]
    keys = {n: key[KEY:] for n, key in zip(held["nodes"], held["keys"], strict=True) if n != me}
    known = [crypto.pairwise_mask(held["mask"], key, me, n, 1, LENGTH) for n, key in keys.items()]
    known.append(crypto.self_mask(held["seed"], 1, LENGTH))
    assert np.array_equal(clients.masked[me] - sum(known), clients.vectors[me])
    for mask in known:
        assert chi_square(clients.masked[me] - (sum(known) - mask)) < 400


def test_what_clients_send_holds_none_of_their_secrets() -> None:
    clients = Clients("shares", NODES[:3])
    seen = blobs(clients.sent) + b"|" + blobs({0: clients.peers})
    for held in clients.secrets.values():
        assert not [name for name in ("seed", "mask", "channel") if held[name] in seen]
        own = crypto.self_mask(held["seed"], 1, 8)
        tried = [seen[i : i + KEY] for i in range(len(seen) - KEY + 1)]
        assert not any(np.array_equal(crypto.self_mask(blob, 1, 8), own) for blob in tried[::8])
    secrets = {held[name] for held in clients.secrets.values() for name in ("seed", "mask", "channel")}
    assert len(secrets) == 9


def test_a_letter_is_bound_to_its_run_round_sender_and_receiver() -> None:
    clients = Clients("shares", run=11, round=6)
    sender, (letter, *_) = clients.peers["keys"][1][:KEY], clients.sent[17]["letters"]
    channel, route = clients.secrets[5]["channel"], "run {}, round {}, from node {} to node {}"
    assert len(crypto.decrypt(channel, sender, letter, route.format(11, 6, 17, 5))) == 2 * SHARE
    for other in ((8, 6, 17, 5), (11, 2, 17, 5), (11, 6, 5, 17), (11, 6, 17, 99)):
        with pytest.raises(IncompatibleUpdates, match="changed on their way"):
            crypto.decrypt(channel, sender, letter, route.format(*other))


def test_the_threshold_is_of_those_who_sent_keys_and_fewer_shares_give_no_secret() -> None:
    clients = Clients("mask")
    assert threshold(5) == 4
    for i, owner in enumerate(NODES):
        pairs = {place: clients.held(n)["pairs"][i] for place, n in enumerate(NODES)}
        for name, part in (("seed", slice(0, SHARE)), ("mask", slice(SHARE, None))):
            shares = {place: pair[part] for place, pair in pairs.items()}
            secret = clients.secrets[owner][name]
            assert crypto.join({place: shares[place] for place in (0, 1, 2, 4)}) == secret
            try:
                assert crypto.join({place: shares[place] for place in (0, 2, 4)}) != secret
            except ValueError:
                continue


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": NODES[1:], "keys": slice(1, None)},
        {"nodes": [*NODES[:4], 7]},
        {"keys": [1, 0, 2, 3, 4]},
        {"keys": [0, 1, 2, 3, 3]},
        {"nodes": [5, 5, 17, 99, 2**40], "keys": [1, 0, 2, 3, 4]},
        {"nodes": NODES[:2], "keys": slice(2)},
        {"round": 2},
    ],
)
def test_a_client_refuses_keys_that_cannot_be(change: dict[str, Any]) -> None:
    clients = Clients("keys")
    keys, chosen = clients.peers["keys"], change.get("keys", slice(None))
    keys_sent = keys[chosen] if isinstance(chosen, slice) else [keys[i] for i in chosen]
    asked = clients.peers | change | {"keys": keys_sent}
    node = NODES[-1] if 7 in asked["nodes"] else NODES[0]
    with pytest.raises(IncompatibleUpdates, match="expected"):
        clients.ask(protocol.shares, node, **asked)
    assert "seed" not in clients.held(node)


def test_a_client_draws_its_secrets_once_and_takes_none_from_the_server() -> None:
    clients = Clients("keys")
    before = clients.held(5)
    clients.ask(protocol.shares, 5, **clients.peers, channel=bytes(KEY), mask=bytes(KEY), seed=bytes(KEY))
    after = clients.held(5)
    assert [after[name] for name in ("channel", "mask")] == [before["channel"], before["mask"]]
    assert after["seed"] != bytes(KEY)
    with pytest.raises(IncompatibleUpdates, match="after step 'keys' of round 1"):
        clients.ask(protocol.shares, 5, **clients.peers)


@pytest.mark.parametrize(
    "places",
    [[0, 1, 2], [1, 2, 3, 4], [0, 1, 2, 2], [0, 1, 2, 3, 5]],
    ids=["few", "not it", "twice", "stranger"],
)
def test_a_client_refuses_members_that_cannot_be(places: list[int]) -> None:
    clients = Clients("shares")
    letters = [clients.sent[n]["letters"][0] for n in NODES]
    nodes = [[*NODES, 12345][i] for i in places]
    with pytest.raises(IncompatibleUpdates, match="expected at least 4 nodes"):
        clients.mask(5, nodes=nodes, letters=[[*letters, letters[0]][i] for i in places])
    clients.mask(5)  # a refusal costs nothing


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint32])
def test_only_vectors_mod_2_to_the_64_are_masked(dtype: Any) -> None:
    clients = Clients("shares")
    clients.vectors[5] = np.ones(3, dtype)
    with pytest.raises(TypeError):
        clients.mask(5)


def test_a_client_masks_one_vector_a_round_and_keeps_nothing_to_mask_with() -> None:
    clients = Clients("mask")
    assert clients.held(5).keys() == {"step", "round", "least", "nodes", "pairs"}
    for change in ({}, {"round": 2}):
        with pytest.raises(IncompatibleUpdates, match="after step 'shares' of round"):
            clients.mask(5, **change)
    kept, mine = blobs({n: clients.held(n) for n in NODES}), clients.secrets[5]
    assert not [name for name in ("seed", "mask", "channel") if mine[name] in kept]
    fresh = Clients("shares")
    with pytest.raises(IncompatibleUpdates, match="after step 'shares' of round 2"):
        fresh.mask(5, round=2)


REFUSED = {
    "too few": NODES[:3],
    "doubles": [5, 5, 17, 99],
    "a stranger": [*NODES, 3],
    "a stranger for a member": [5, 17, 99, 3],
    "itself missing": NODES[1:],
}


@pytest.mark.parametrize("survivors", REFUSED.values(), ids=REFUSED)
def test_a_client_refuses_survivors_that_cannot_be(survivors: list[int]) -> None:
    clients = Clients("mask")
    with pytest.raises(IncompatibleUpdates, match="expected at least 4 survivors"):
        clients.ask(protocol.unmask, 5, survivors=survivors)
    with pytest.raises(IncompatibleUpdates, match="after step 'masked' of round 2"):
        clients.ask(protocol.unmask, 5, round=2, survivors=NODES)
    clients.ask(protocol.unmask, 5, survivors=NODES)  # a refusal costs nothing


def test_a_client_that_has_sent_no_vector_reveals_nothing() -> None:
    for step in ("keys", "shares"):
        with pytest.raises(IncompatibleUpdates, match="after step 'masked' of round 1"):
            Clients(step).ask(protocol.unmask, 5, survivors=NODES)


def test_a_client_reveals_one_share_a_peer_and_once() -> None:
    clients = Clients("mask")
    pairs = clients.held(5)["pairs"]
    found = clients.ask(protocol.unmask, 5, survivors=NODES[:4])["shares"]
    assert found == [pair[:SHARE] for pair in pairs[:4]] + [pairs[4][SHARE:]]
    assert RECORD not in clients.contexts[5].state
    for again in (NODES[:4], NODES, [5, *NODES[2:]]):
        with pytest.raises(IncompatibleUpdates, match="no step is repeated"):
            clients.ask(protocol.unmask, 5, survivors=again)


@pytest.mark.parametrize("step", ["keys", "shares", "mask"])
def test_a_new_round_deletes_what_is_left_of_the_one_before(step: str) -> None:
    clients = Clients(step)
    before = blobs({5: clients.held(5)}).split(b"|")
    clients.ask(protocol.keys, 5, round=2)
    assert clients.held(5).keys() == {"step", "round", "channel", "mask"}
    assert not [x for x in blobs({5: clients.held(5)}).split(b"|") if x in before]
