import math
from typing import Any

import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedlora.strategies import FedIT, FFALoRA, FlexLoRA


def test_a_dropped_client_is_named_counted_and_leaves_no_trace(lab: Any, noise: Any) -> None:
    ran = lab.run(FedIT(), client=noise(failing=frozenset({1})), rounds=1)
    without = lab.run(FedIT(), rounds=1, change=lab.keep(0, 2))
    assert ran.digest == without.digest
    status = [(x["client"], x["status"], x.get("reason")) for x in ran.lines("clients.jsonl")]
    reason = "the client failed: RuntimeError: no luck for 1"
    assert status == [(0, "ok", None), (1, "dropped", reason), (2, "ok", None)]
    assert "client 1 dropped: the client failed" in ran.text
    (metrics,) = ran.lines("metrics.jsonl")
    assert (metrics["clients"], metrics["dropped"]) == (2, 1)
    silent = without.lines("clients.jsonl")[1]
    assert (silent["status"], silent["reason"], silent["bytes_up"]) == (
        "dropped",
        "no reply by the end of the round",
        0,
    )
    assert silent["bytes_down"] > 0


def test_a_reply_twice_or_from_an_unasked_node_is_dropped(lab: Any) -> None:
    honest = lab.run(FedIT(), [4] * 4, rounds=1, clients_per_round=2)
    asked = honest.sampled()[0]

    def twice(replies: list[Message]) -> list[Message]:
        return [*replies, replies[0], replies[0]]

    ran = lab.run(FedIT(), [4] * 4, rounds=1, clients_per_round=2, change=twice)
    assert ran.digest == honest.digest
    assert ran.sampled() == [asked]
    assert ran.text.count("nobody asked for") == 2

    def stranger(replies: list[Message]) -> list[Message]:
        other = next(c for c in range(4) if c not in asked)
        reply = replies[0]
        forged = Message(reply.content, reply_to=request(1000 + other))
        return [forged, *replies]

    def request(node: int) -> Message:
        message = Message(RecordDict(), node, "train")
        message.metadata.__dict__["_message_id"] = "m"
        return message

    ran = lab.run(FedIT(), [4] * 4, rounds=1, clients_per_round=2, change=stranger)
    assert ran.digest == honest.digest
    assert ran.sampled() == [asked]
    assert "nobody asked for" in ran.text


def test_an_old_reply_is_dropped(lab: Any) -> None:
    kept: list[Message] = []

    def replay(replies: list[Message]) -> list[Message]:
        kept.append(replies[0])
        return [kept[0], *replies[1:]]

    ran = lab.run(FedIT(), rounds=2, change=replay)
    dropped = [x for x in ran.lines("clients.jsonl") if x["status"] == "dropped"]
    assert [(x["round"], x["client"]) for x in dropped] == [(2, 0)]
    assert "a former round's" in dropped[0]["reason"]


@pytest.mark.parametrize("strategy", [FedIT(), FFALoRA(), FlexLoRA()], ids=lambda s: type(s).__name__)
def test_the_order_of_replies_does_not_matter(lab: Any, strategy: Any) -> None:
    assert lab.run(strategy).digest == lab.run(strategy, change=lambda r: r[::-1]).digest


@pytest.mark.parametrize("count", [1e308, 10**400, 1e-3, 0.5], ids=["1e308", "10^400", "1e-3", "0.5"])
def test_no_number_of_examples_ends_the_run(lab: Any, count: float) -> None:
    def change(replies: list[Message]) -> list[Message]:
        for reply in replies[:2]:
            numbers = dict(reply.content.metric_records["metrics"]) | {"num-examples": count}
            reply.content["metrics"] = MetricRecord(numbers)
        return replies

    ran = lab.run(FedIT(), rounds=1, change=change)
    assert len(ran.lines("metrics.jsonl")) == 1
    assert all(math.isfinite(float(t.sum())) for _, t in ran.federation.state.adapter.tensors())


@pytest.mark.parametrize("record", ["config", "metrics"])
def test_an_empty_list_in_a_reply_does_not_end_the_run(lab: Any, record: str) -> None:
    """flwr cannot (1.42 as 1.41) count the bytes of one."""

    def change(replies: list[Message]) -> list[Message]:
        replies[0].content[record]["more"] = []
        return replies

    assert len(lab.run(FedIT(), rounds=1, change=change).lines("metrics.jsonl")) == 1


def test_fractions_of_an_example_do_not_end_the_run(lab: Any) -> None:
    def change(replies: list[Message]) -> list[Message]:
        for reply in replies:
            numbers = dict(reply.content.metric_records["metrics"]) | {"num-examples": 0.5}
            reply.content["metrics"] = MetricRecord(numbers)
        return replies

    assert len(lab.run(FedIT(), rounds=1, change=change).lines("metrics.jsonl")) == 1
