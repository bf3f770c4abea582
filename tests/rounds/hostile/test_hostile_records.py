"""Hostile records: numbers, scales, errors, copies and what nobody asked for, over all forms of messages."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora import strategies
from fedlora.rounds.sanity_checks import check_updates

pytestmark = pytest.mark.slow

ALL = [getattr(strategies, name)() for name in strategies.__all__]
ALL.append(strategies.FedMS(global_rounds=0))  # whose messages are those of its second stage
EACH = 35  # malformed replies a strategy
Draw = Callable[[Any], Any]


def numbers(content: RecordDict, **more: Any) -> RecordDict:
    found = dict(content.metric_records["metrics"]) | {k.replace("_", "-"): v for k, v in more.items()}
    content["metrics"] = MetricRecord({k: v for k, v in found.items() if v is not None})
    return content


def examples(draw: Draw, content: RecordDict, world: Any) -> str:
    odd = [
        None,
        0,
        -1,
        -0.0,
        0.99,
        float("nan"),
        float("inf"),
        1e13,
        2**63,
        10**400,
        [3],
        [3.0],
        [],
        -(10**400),
    ]
    numbers(content, num_examples=draw(st.sampled_from(odd) | st.integers(max_value=0)))
    return "examples"


def boolean_examples(draw: Draw, content: RecordDict, world: Any) -> str:
    content["metrics"].__dict__["_data"]["num-examples"] = True  # past Flower's own check
    return "examples"


def replayed(draw: Draw, content: RecordDict, world: Any) -> str:
    odd = st.integers().filter(lambda x: x != world.ROUND) | st.sampled_from(
        [None, 3.0, [3], float("nan"), [1] * 9999]
    )
    numbers(content, round=draw(odd))
    return "round"


def flood(draw: Draw, content: RecordDict, world: Any) -> str:
    if draw(st.booleans()):
        numbers(content, **{f"m{i}": 0.5 for i in range(draw(st.sampled_from([65, 10**4])))})
    else:
        numbers(content, **{"m" * 10**6: 1.0})
    return "metrics"


def scales(draw: Draw, content: RecordDict, world: Any) -> str:
    right = [pair.scale for pair in world.tasks[world.EVIL].adapter.pairs.values()]
    lists = st.lists(st.floats() | st.just(float("nan")), min_size=1, max_size=4)
    odd = (
        lists
        | st.text(max_size=3)
        | st.floats()
        | st.sampled_from([[True] * 2, ["x"], [b""], right * 2 + [1.0]])
    )
    value = draw(odd.filter(lambda x: x != right))
    content["config"] = ConfigRecord({"scales": value})
    return "scales"


def records(draw: Draw, content: RecordDict, world: Any) -> str:
    name = draw(st.sampled_from(["arrays", "metrics", "config"]))
    kinds = [ArrayRecord, MetricRecord, ConfigRecord]
    what = draw(st.integers(0, 3))
    if what == 3:
        del content[name]
        return name
    if isinstance(content[name], kinds[what]):
        content["more"] = kinds[what]()
        return "more"
    content[name] = kinds[what]()
    return name


def extra_words(draw: Draw, content: RecordDict, world: Any) -> str:
    content["config"]["task"] = draw(st.text() | st.just("x" * 10**6))
    return "task"


def nothing(draw: Draw, content: RecordDict, world: Any) -> str:
    for name in list(content):
        del content[name]
    return "metrics"


TAMPERS = [examples, boolean_examples, replayed, flood, scales, records, extra_words, nothing]


@settings(max_examples=EACH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), tamper=st.sampled_from(TAMPERS), position=st.integers(0, 2))
@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_a_malformed_record_is_dropped_by_name_and_changes_nothing(
    strategy: Any, data: Any, tamper: Any, position: int, world: Any
) -> None:
    found = world(strategy)
    content = found.reply(found.EVIL)
    word = tamper(data.draw, content, found)
    found.judge(lambda asked: Message(content, reply_to=asked), position, word)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    code=st.sampled_from([-1, 0, 1, 2, 3, 1000, 1001, 10**12]) | st.integers(),
    reason=st.none() | st.text(max_size=30) | st.just("no\nluck\x1b[31m " * 10**4),
    position=st.integers(0, 2),
)
def test_an_error_of_any_code_is_a_reason(code: int, reason: str | None, position: int, world: Any) -> None:
    found = world(strategies.FedIT())
    found.judge(lambda asked: Message(Error(code, reason), reply_to=asked), position, "the client")


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_the_honest_replies_are_all_taken(strategy: Any, world: Any) -> None:
    """Else the test above would hold for a server that takes nothing."""
    found = world(strategy)
    updates, _, lines, warned = found.receive(
        lambda asked: [Message(found.reply(k), reply_to=message) for k, message in enumerate(asked)]
    )
    assert len(updates) == 3
    assert not warned
    assert {line["status"] for line in lines} == {"ok"}


@pytest.mark.parametrize("strategy", [s for s in ALL if s.mixed_ranks], ids=lambda s: type(s).__name__)
def test_a_copy_of_a_client_of_another_rank_is_dropped(strategy: Any, world: Any) -> None:
    found = world(strategy)
    found.judge(lambda asked: Message(found.reply(0), reply_to=asked), 2, "expected float32")


def test_a_copy_of_a_whole_message_counts_for_nobody(world: Any) -> None:
    """It answers what another client was asked."""
    found = world(strategies.FedIT())

    def answers(asked: list[Message]) -> list[Message]:
        copy = Message(found.reply(0), reply_to=asked[0])
        copy.metadata.__dict__["_src_node_id"] = 1000 + found.EVIL
        return [copy, *(Message(found.reply(k), reply_to=asked[k]) for k in (0, 2))]

    updates, _, lines, warned = found.receive(answers)
    assert [u.peer.id for u in updates] == [0, 2]
    assert lines[found.EVIL]["status"] == "dropped"
    assert any("nobody asked for" in text for text in warned)


def test_a_copy_of_a_client_of_the_same_rank_is_told(world: Any) -> None:
    """It is a sound update; that two clients sent it is for the user to judge."""
    found = world(strategies.FedIT())
    updates, tasks, _, _ = found.receive(
        lambda asked: [
            Message(found.reply(2), reply_to=asked[2]),
            Message(found.reply(2), reply_to=asked[1]),
        ],
    )
    (said,) = check_updates(updates, tasks)
    assert said.startswith("client 1, client 2 sent the same update, bit for bit")
