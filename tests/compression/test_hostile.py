"""Replies in code that no client of ours would send: that client is dropped, and what is wrong named."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from fedlora import strategies
from fedlora.compression import BF16, Int8, TopK

TOPK = TopK(density=0.1)  # 13 of 128 numbers
BEYOND = np.frombuffer(b"\xaa\xaa\xaa\x08" + b"\xff" * 5, np.uint8)  # 13 growing places, the last of them 135


def arrays(**changed: np.ndarray | Array | None) -> Any:
    """A change of a reply: other arrays in the place of its own; None leaves one out."""

    def make(reply: Message) -> None:
        found = dict(reply.content.array_records["arrays"])
        for name, array in changed.items():
            found.pop(name, None)
            if array is not None:
                found[name] = array if isinstance(array, Array) else Array(array)
        reply.content["arrays"] = ArrayRecord(found)

    return make


def config(**words: Any) -> Any:
    def make(reply: Message) -> None:
        old = dict(reply.content.config_records["config"])
        reply.content["config"] = ConfigRecord({**old, **words})

    return make


def lying(array: np.ndarray, data: bytes) -> Array:
    made = Array(array)
    made.data = data
    return made


FULL = {"a.q.A": np.zeros((4, 8), np.float32)}
HOSTILE = {
    "places that are too few": (TOPK, arrays(places=np.zeros(9, np.uint8)), "'places': expected 13 places"),
    "places beyond the end": (TOPK, arrays(places=BEYOND), "growing places below 128"),
    "places of another length": (TOPK, arrays(places=np.zeros(13, np.uint8)), "'places': expected uint8"),
    "no places": (TOPK, arrays(places=None), "missing ['places']"),
    "values of another dtype": (TOPK, arrays(values=np.zeros(13)), "'values': expected float32 (13,)"),
    "values that are too many": (TOPK, arrays(values=np.zeros(99, np.float32)), "'values': expected"),
    "values that are not finite": (
        TOPK,
        arrays(values=np.full(13, np.nan, np.float32)),
        "numbers that are not finite",
    ),
    "values that are huge": (TOPK, arrays(values=np.full(13, 1e30, np.float32)), "has a norm of"),
    "bytes that are no array": (TOPK, arrays(values=lying(np.zeros(13, np.float32), b"PK\3\4")), "no array"),
    "scales that are infinite": (Int8(), arrays(scales=np.full(6, np.inf, np.float32)), "not finite"),
    "NaN in halves": (BF16(), arrays(halves=np.full(128, 0x7FC0, np.uint16)), "'a.q.A' has numbers"),
    "an array more": (TOPK, arrays(more=np.zeros(3)), "unknown ['more']"),
    "a whole update": (TOPK, arrays(**FULL), "unknown ['a.q.A']"),
    "another shape": (TOPK, config(shape=1), "'shape': expected a number below 1, got 1"),
    "a shape of words": (TOPK, config(shape="0"), "'shape': expected a number below 1"),
    "other scales": (TOPK, config(scales=[2.0, 3.0]), "scales differ"),
    "a word more": (TOPK, config(more=1), "['more'], which nobody asked for"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_the_client_alone_is_dropped_and_the_reason_names_what_is_wrong(lab: Any, what: str) -> None:
    code, evil, words = HOSTILE[what]

    def change(replies: list[Message]) -> list[Message]:
        evil(replies[1])
        return replies

    ran = lab.run(strategies.FedIT(), rounds=1, compression=code, change=change)
    lines = ran.lines("clients.jsonl")
    assert [line["status"] for line in lines] == ["ok", "dropped", "ok"]
    assert words in lines[1]["reason"]
    assert "client 1 dropped" in ran.text.replace("\n", " ")
    alone = lab.run(strategies.FedIT(), rounds=1, compression=code, change=lab.keep(0, 2))
    assert ran.digest == alone.digest


@pytest.mark.parametrize("sends", [None, TOPK])
def test_client_and_server_of_other_settings_do_not_understand_each_other(lab: Any, sends: Any) -> None:
    ran = lab.run(strategies.FedIT(), rounds=1, compression=Int8(), site={"compression": sends})
    reasons = [line["reason"] for line in ran.lines("clients.jsonl")]
    assert all("the task is in code" in reason for reason in reasons)
    ran = lab.run(
        strategies.FedIT(), rounds=1, compression=TopK(density=0.1), site={"compression": TopK(density=0.2)}
    )
    assert all("expected float32 (13,)" in line["reason"] for line in ran.lines("clients.jsonl"))
