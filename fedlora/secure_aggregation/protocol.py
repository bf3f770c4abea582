"""The protocol of secure aggregation: a server that follows it learns the sum of the clients' vectors only.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017
(https://doi.org/10.1145/3133956.3133982), in the variant for an honest-but-curious server, without
signatures.

1. keys: every client makes two new key pairs, one to encrypt messages to other clients (channel) and one for
masks. 2. shares: every client draws the seed of its self-mask. It sends every client a secret share of the
seed and of its
   private mask key, encrypted such that the server cannot read them.
3. train: the client trains and sends its vector plus its self-mask, plus or minus a pairwise mask for each
other
   client. Pairwise masks cancel in the sum.
4. unmask: clients reveal their shares of the seeds of clients that delivered a vector, and of the mask keys
of
   clients that did not, whose pairwise masks remain in the sum.

The seed and the mask key of the same client together would reveal its vector, so no client reveals shares of
both. Of the n clients that sent keys, t = floor(2n/3) + 1 must stay to the end. The server and up to t - 1
clients that collude with it learn only the sum of the vectors of the others. A client keeps its data between
messages in `Context.state`, because every message may be handled by another process.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedlora.errors import IncompatibleUpdates
from fedlora.secure_aggregation import crypto
from fedlora.secure_aggregation.crypto import KEY, SHARE, Words, derive, public

RECORD = "secure"  # the name of the record in every message and in a client's state
LEAST = 3  # with two clients, each could subtract its own vector from the sum


def threshold(clients: int) -> int:
    """How many of the clients that sent keys must stay to the end: t in the paper, more than two thirds."""
    return 2 * clients // 3 + 1


def keys(message: Message, context: Context) -> Message:
    """Reply to "query.keys" with two new public keys; the state of an earlier round is deleted."""
    round, channel, mask = message.content.config_records[RECORD]["round"], crypto.new_key(), crypto.new_key()
    context.state[RECORD] = ConfigRecord({"step": "keys", "round": round, "channel": channel, "mask": mask})
    return _reply(message, {"round": round, "keys": [public(channel) + public(mask)]})


def shares(message: Message, context: Context) -> Message:
    """Reply to "query.shares" with encrypted shares of the seed and mask key, for every client and itself.

    Raises:
        IncompatibleUpdates: this client is not at this step of the round, fewer than 3 clients take part,
            their keys are not all different, or the keys listed for this client are not those that it sent.
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
        crypto.encrypt(
            held["channel"], key[:KEY], of_seed + of_mask, _route(context, held["round"], me, node)
        )
        for (node, key), of_seed, of_mask in zip(peers.items(), *halves, strict=True)
    ]
    context.state[RECORD] = ConfigRecord({**asked, **held, "step": "shares", "seed": seed})
    commitment = derive(seed, "commitment")
    return _reply(message, {"round": held["round"], "letters": letters, "commitment": [commitment]})


def mask(vector: Words, secure: ConfigRecord, context: Context) -> Words:
    """Add a client's masks to its vector. It can be called once in a round.

    Afterwards the client's state holds only the shares that it received; the secrets of its masks are
    deleted.

    Args:
        vector: the summand, uint64, (length,); the same length for all clients.
        secure: the record `RECORD` of the training message, which `SecureRound.attachment` made.
        context: the client's context.

    Raises:
        IncompatibleUpdates: this client is not a member of the round or has already masked a vector in it,
            there are fewer members than the threshold, or encrypted shares were changed on their way.
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
        crypto.decrypt(held["channel"], peers[node][:KEY], letter, _route(context, round, node, me))
        for node, letter in zip(members, sent["letters"], strict=True)
    ]
    masked = vector.astype(np.uint64, casting="no")  # a copy; raises for any other dtype
    masked += crypto.self_mask(held["seed"], round, len(masked))
    for peer in {*members} - {me}:
        masked += crypto.pairwise_mask(held["mask"], peers[peer][KEY:], me, peer, round, len(masked))
    kept = {"step": "masked", "round": round, "least": least, "nodes": members, "pairs": pairs}
    context.state[RECORD] = ConfigRecord(kept)
    return masked


def unmask(message: Message, context: Context) -> Message:
    """Reply to "query.unmask" with shares of the survivors' seeds and of the other members' mask keys.

    The state of the round is deleted, so there cannot be a second reply.

    Raises:
        IncompatibleUpdates: this client has not sent a vector or has already replied; or the survivors are
            not members of the round, lack this client, or are fewer than the threshold.
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


def _held(asked: Mapping[str, Any], context: Context, step: str) -> dict[str, Any]:
    """A client's state, which must be of the requested round and after the given step."""
    held: dict[str, Any] = dict(context.state.config_records.get(RECORD, {}))
    if (held.get("step"), held.get("round")) != (step, asked["round"]):
        raise IncompatibleUpdates(
            f"secure aggregation: expected node {context.node_id} to be after step '{step}' of round "
            f"{asked['round']}, it is after '{held.get('step')}' of {held.get('round')}; no step is repeated"
        )
    return held


def _route(context: Context, round: int, sender: int, receiver: int) -> str:
    """The associated data of encrypted shares: run, round, sender and receiver."""
    return f"run {context.run_id}, round {round}, from node {sender} to node {receiver}"


def _reply(message: Message, content: Mapping[str, Any]) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord(dict(content))}), reply_to=message)
