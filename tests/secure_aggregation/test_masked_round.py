"""Rounds whose updates the server sees as a sum only: the same model, and nothing else of a client."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message

from fedlora import strategies
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.core.vectors import form
from fedlora.engines.in_process import InProcessGrid
from fedlora.rounds.codec import size
from fedlora.secure_aggregation.crypto import decode
from fedlora.secure_aggregation.masked_round import Terms

LINEAR = ["FedIT", "FFALoRA", "RoLoRA", "FedSVD", "FeDeRA", "SLoRA", "PrivateLoRA"]


def ranks(strategy: Any) -> tuple[int, ...]:
    return (4, 1, 3, 4, 2) if strategy.mixed_ranks else (4,) * 5


def close(one: Any, other: Any) -> None:
    states = [ran.federation.state for ran in (one, other)]
    for (name, a), (_, b) in zip(*[state.adapter.tensors() for state in states], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, msg=name)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_the_model_is_that_of_plain_sums_for_every_linear_strategy(lab: Any, name: str, weights: str) -> None:
    strategy = getattr(strategies, name)()
    scales = {0: 2.0, 1: 8.0, 2: 8 / 3, 3: 2.0, 4: 4.0} if strategy.mixed_ranks else None
    options = {"rounds": 3, "weights": weights, "scales": scales}
    plain = lab.run(strategy, ranks(strategy), **options)
    secure = lab.run(strategy, ranks(strategy), secure_sum=True, **options)
    assert all(line["clients"] == 5 for line in secure.lines("metrics.jsonl")), secure.text
    close(plain, secure)


def test_all_strategies_that_are_linear_are_tested_here() -> None:
    found = {n for n in strategies.__all__ if (s := getattr(strategies, n)).linear and not s.personal}
    assert found == {*LINEAR}


@pytest.mark.parametrize("fuse", [None, 1])
def test_a_client_that_fails_is_left_out_of_the_sum(lab: Any, noise: Any, fuse: int | None) -> None:
    runs = [
        lab.run(strategies.FedIT(), (4,) * 5, client=noise(failing=frozenset({3})), fuse=fuse, secure_sum=on)
        for on in (False, True)
    ]
    close(*runs)
    assert [line["client"] for line in runs[1].lines("clients.jsonl") if line["status"] != "ok"] == [3, 3]


def test_no_reply_holds_anything_but_a_vector_that_says_nothing(lab: Any) -> None:
    seen: list[Message] = []

    def watched(replies: list[Message]) -> list[Message]:
        seen.extend(replies)
        return replies

    ran = lab.run(strategies.FedIT(), (4,) * 4, rounds=1, secure_sum=True, change=watched)
    assert len(seen) == 4
    for reply in seen:
        [array] = reply.content.array_records["arrays"].values()
        assert "num-examples" not in reply.content.metric_records["metrics"]
        values = decode(array.numpy())
        assert float(values.abs().median()) > 1e8  # uniform over the whole range; the values are about 10
    assert {line["examples"] for line in ran.lines("clients.jsonl")} == {1}
    assert "aggregation_error" not in ran.lines("metrics.jsonl")[0]


@pytest.mark.parametrize("secure", [False, True])
def test_every_byte_of_every_message_of_a_round_is_in_the_log(
    lab: Any, monkeypatch: Any, secure: bool
) -> None:
    sent: Counter[str] = Counter()
    answers = InProcessGrid._answers

    def watched(self: Any, site: Any, group: list[Message]) -> list[Message]:
        replies = answers(self, site, group)
        for way, messages in (("bytes_down", group), ("bytes_up", replies)):
            for message in messages:
                if message.metadata.message_type != "query.profile":  # once a run, before any round
                    sent[way] += size(message.content)
        return replies

    monkeypatch.setattr(InProcessGrid, "_answers", watched)
    ran = lab.run(strategies.FFALoRA(), (4, 1, 3, 2), rounds=2, secure_sum=secure)
    lines = ran.lines("clients.jsonl")
    assert {way: sum(line[way] for line in lines) for way in sent} == sent


@pytest.mark.parametrize(
    ("cap", "examples", "share"), [(None, 7, 1.0), (20, 10, 0.5), (20, 20, 1.0), (20, 10**9, 1.0)]
)
def test_under_client_level_privacy_a_client_bounds_what_it_adds_itself(
    lab: Any, cap: int | None, examples: int, share: float
) -> None:
    sent, scales = lab.adapter(4), {"a.q": 2.0, "b.v": 2.0}
    far = Adapter({m: replace(p, B=p.B + 30.0) for m, p in sent.pairs.items()}, sent.extra)
    near = Adapter({m: replace(p, B=p.B + 1e-3) for m, p in sent.pairs.items()}, sent.extra)
    terms = Terms(form(Task(sent)), scales, 5, clip=0.5, cap=cap)
    again = Terms.read(terms.write())
    for got, norm in ((far, 0.5), (near, 1e-3 * (4 * 14) ** 0.5)):
        found = again.vector(sent, got, examples)
        assert float(found.norm()) == pytest.approx(share * norm, rel=1e-5)
        assert found[-1] == 0  # how many rows, and whether there are any, is nobody's business


def swap(change: Any) -> Any:
    """What arrives: the reply of client 2 with another array in it."""

    def changed(replies: list[Message]) -> list[Message]:
        for reply in replies:
            if reply.metadata.src_node_id == 1002 and reply.has_content():
                array = reply.content.array_records["arrays"]["masked"]
                reply.content["arrays"] = ArrayRecord(change(array))
        return replies

    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {"other": a},
        lambda a: {"masked": a, "more": a},
        lambda a: {"masked": Array(a.numpy()[:-1])},
        lambda a: {"masked": Array(a.numpy().astype(np.float64))},
        lambda a: {"masked": Array(a.dtype, a.shape, a.stype, b"\x93NUMPY nothing")},
        lambda a: {},
    ],
)
def test_a_reply_that_is_no_vector_is_dropped_and_the_others_count(lab: Any, change: Any) -> None:
    ran = lab.run(strategies.FedIT(), (4,) * 5, rounds=1, secure_sum=True, change=swap(change))
    want = lab.run(strategies.FedIT(), (4,) * 5, rounds=1, change=lab.keep(0, 1, 3, 4))
    assert [line["status"] for line in ran.lines("clients.jsonl")] == ["ok", "ok", "dropped", "ok", "ok"]
    close(ran, want)


def test_too_few_clients_leave_the_state_as_it_was_and_say_so(lab: Any) -> None:
    two = lab.run(strategies.FedIT(), (4, 4), rounds=1, secure_sum=True)
    assert "at least 3 clients" in two.text
    gone = lab.run(strategies.FedIT(), (4,) * 5, rounds=1, secure_sum=True, change=lab.keep(0, 1, 2))
    assert "4 clients are needed" in gone.text
    for ran in (two, gone):
        assert ran.digest == lab.adapter(4).digest()
        assert "the state stays as it was" in ran.text


def test_a_client_that_diverged_does_not_send(lab: Any, noise: Any) -> None:
    class Diverging(noise):  # type: ignore[misc]
        def _moved(self, a: Any) -> Any:
            moved = super()._moved(a)
            if a.client == 1:
                moved.extra["head.bias"].fill_(float("nan"))
            return moved

    ran = lab.run(strategies.FedIT(), (4,) * 5, rounds=1, client=Diverging(), secure_sum=True)
    want = lab.run(strategies.FedIT(), (4,) * 5, rounds=1, change=lab.keep(0, 2, 3, 4))
    [line] = [line for line in ran.lines("clients.jsonl") if line["status"] != "ok"]
    assert "NaN or infinity" in line["reason"]
    close(ran, want)


def test_nothing_of_a_round_s_secrets_is_left_when_it_ends(lab: Any) -> None:
    ran = lab.run(strategies.FedIT(), (4,) * 3, rounds=1, secure_sum=True)
    assert not any(context.state for context in ran.grid._contexts.values())
