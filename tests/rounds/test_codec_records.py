import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.core.messages import Peer, Task
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import read_update

NAME = "a.q.A"


def with_numbers(wire: Any, **numbers: Any) -> RecordDict:
    content = wire.honest(Task(wire.adapter()))
    found = dict(content.metric_records["metrics"]) | {k.replace("_", "-"): v for k, v in numbers.items()}
    content["metrics"] = MetricRecord({k: v for k, v in found.items() if v is not None})
    return content


def test_other_names_are_refused(wire: Any) -> None:
    task = Task(wire.adapter())
    content = wire.honest(task)
    arrays = dict(content.array_records["arrays"])
    missing = {n: a for n, a in arrays.items() if n != NAME}
    assert NAME in wire.refused(RecordDict({**content, "arrays": ArrayRecord(missing)}))
    more = {**arrays, "c.A": arrays[NAME]}
    assert "c.A" in wire.refused(RecordDict({**content, "arrays": ArrayRecord(more)}))
    assert NAME in wire.refused(RecordDict({**content, "arrays": ArrayRecord({})}))
    # An A where only B is shared.
    half = Task(wire.adapter(), frozenset("B"), frozenset("B"))
    assert NAME in wire.refused(wire.honest(task), half)


@pytest.mark.parametrize("record", ["arrays", "metrics", "config"])
def test_a_missing_record_is_named(record: str, wire: Any) -> None:
    content = wire.honest(Task(wire.adapter()))
    del content[record]
    assert record in wire.refused(content)
    content[record] = ConfigRecord() if record != "config" else MetricRecord()  # of another type
    wire.refused(content)
    assert "metrics" in wire.refused(RecordDict())


@pytest.mark.parametrize(
    "scales", [None, [], [1.7], [1.7, 2.7, 1.0], [1.7, 9.0], [2.7, 1.7], 1.7, "x", [math.nan] * 2]
)
def test_other_scales_are_refused(scales: Any, wire: Any) -> None:
    content = wire.honest(Task(wire.adapter()))
    content["config"] = ConfigRecord({} if scales is None else {"scales": scales})
    assert "scales" in wire.refused(content)


@pytest.mark.parametrize("value", [None, 0, -1, -0.0, math.nan, math.inf, -math.inf, [3], [3.0]])
def test_a_number_of_examples_that_is_none_is_refused(value: Any, wire: Any) -> None:
    assert "examples" in wire.refused(with_numbers(wire, num_examples=value))


@pytest.mark.parametrize("value", [10**400, 1e308, 1e300, 2**63], ids=["10^400", "1e308", "1e300", "2^63"])
def test_an_absurd_number_of_examples_is_refused(value: Any, wire: Any) -> None:
    """Two of 1e308 overflow the sum of weights; one of 1e300 silences everybody else."""
    assert "examples" in wire.refused(with_numbers(wire, num_examples=value))


@pytest.mark.parametrize("value", [None, 2, 4, -3, 0, [3], 3.5, math.nan])
def test_another_round_is_refused(value: Any, wire: Any) -> None:
    assert "round" in wire.refused(with_numbers(wire, round=value))


def test_a_metric_too_large_for_a_float_does_not_end_the_run(respond: Any, wire: Any) -> None:
    reply = respond(with_numbers(wire, loss=10**400))
    try:
        update = read_update(reply, Task(wire.adapter()), Peer(0, 4), 3)
    except IncompatibleUpdates:
        return
    assert "loss" not in update.metrics


def test_a_failed_client_is_refused_with_its_reason(respond: Any, wire: Any) -> None:
    request = respond(RecordDict())
    reply = Message(Error(2, "out of memory"), reply_to=request)
    with pytest.raises(IncompatibleUpdates, match="out of memory"):
        read_update(reply, Task(wire.adapter()), Peer(0, 4), 3)


values = st.one_of(
    st.integers(), st.floats(), st.lists(st.integers(-9, 9), max_size=3), st.lists(st.floats(), max_size=3)
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.dictionaries(
        st.sampled_from(["num-examples", "round", "loss", "x", "status", "client"]), values
    ),
    scales=st.one_of(
        st.lists(st.floats(), max_size=3), st.text(max_size=3), st.booleans(), st.integers(-9, 9)
    ),
    names=st.lists(st.sampled_from([NAME, "a.q.B", "b.v.A", "", "a.q", "ä", "head.bias"]), max_size=4),
)
def test_made_up_replies_never_raise_anything_else(
    numbers: Any, scales: Any, names: list[str], wire: Any
) -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord({n: Array(np.ones((4, 8), np.float32)) for n in names}),
            "metrics": MetricRecord({"num-examples": 3, "round": 3, **numbers}),
            "config": ConfigRecord({"scales": scales}),
        }
    )
    wire.refused(content)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.dictionaries(st.sampled_from(["num-examples", "loss", "x", "round"]), values))
def test_made_up_numbers_give_a_sound_update_or_none(numbers: Any, respond: Any, wire: Any) -> None:
    content = wire.honest(Task(wire.adapter()))
    content["metrics"] = MetricRecord({"num-examples": 3, "round": 3, **numbers})
    try:
        update = read_update(respond(content), Task(wire.adapter()), Peer(0, 4), 3)
    except IncompatibleUpdates:
        return
    assert 0 < update.weight < math.inf
    assert all(isinstance(v, float) for v in update.metrics.values())
