"""Hostile arrays: names, shapes, ranks, dtypes, numbers and bytes, over all forms that messages have.

With `test_hostile_records.py` more than a thousand malformed replies, through the real inbox.
"""

import io
import pickle
import unicodedata
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora import strategies

pytestmark = pytest.mark.slow

ALL = [getattr(strategies, name)() for name in strategies.__all__]
ALL.append(strategies.FedMS(global_rounds=0))  # whose messages are those of its second stage
EACH = 35  # malformed replies a strategy
Draw = Callable[[Any], Any]


def npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def bomb() -> bytes:
    """A zip of 200 kB that unpacks to 200 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", bytes(1_000_000) * 20)
    return file.getvalue()


BOMB, HEADER = bomb(), npy(np.zeros(3, np.float32))[:64]


class Loaded:
    """Unpickling it is seen."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a reply was unpickled",)


def like(array: Array, data: bytes) -> Array:
    """An array that says it is another, over these bytes."""
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)


def put(content: RecordDict, name: str, array: Array) -> RecordDict:
    content["arrays"] = ArrayRecord({**content.array_records["arrays"], name: array})
    return content


def a_name(draw: Draw, content: RecordDict) -> tuple[str, Array]:
    arrays = content.array_records["arrays"]
    name = draw(st.sampled_from(sorted(arrays)))
    return name, arrays[name]


def missing_key(draw: Draw, content: RecordDict, world: Any) -> str:
    name, _ = a_name(draw, content)
    del content["arrays"][name]
    return "wrong tensors"


def unknown_key(draw: Draw, content: RecordDict, world: Any) -> str:
    _, array = a_name(draw, content)
    taken = set(content.array_records["arrays"])
    name = draw(st.text(max_size=12).filter(lambda text: text not in taken) | st.just("x" * 5000))
    put(content, name, array)
    return "wrong tensors"


def doubled_key(draw: Draw, content: RecordDict, world: Any) -> str:
    name, array = a_name(draw, content)
    twin = draw(
        st.sampled_from([name + " ", name.upper(), "\ufeff" + name, name + "\0", f"base.{name}", f"{name}.0"])
    )
    put(content, unicodedata.normalize("NFD", twin), array)
    return "wrong tensors"


def shape(draw: Draw, content: RecordDict, world: Any) -> str:
    name, array = a_name(draw, content)
    other = draw(st.lists(st.integers(0, 9), max_size=4).map(tuple).filter(lambda s: s != tuple(array.shape)))
    put(content, name, Array(np.ones(other, array.dtype)))
    return f"'{name}'"


def rank(draw: Draw, content: RecordDict, world: Any) -> str:
    """Another rank in every tensor of one module, so that the factors fit each other."""
    task = world.tasks[world.EVIL]
    modules = [m for m in task.adapter.pairs if {f"{m}.A", f"{m}.B"} & {*task.shared()}]
    if not modules:
        return shape(draw, content, world)
    module = draw(st.sampled_from(modules))
    pair = task.adapter.pairs[module]
    other = draw(st.integers(1, 12).filter(lambda r: r != pair.rank))
    for factor, tensor in pair.factors():
        if f"{module}.{factor}" in task.shared():
            new = tuple(other if axis == (factor == "B") else n for axis, n in enumerate(tensor.shape))
            put(content, f"{module}.{factor}", Array(np.ones(new, np.float32)))
    return f"'{module}."


def dtype(draw: Draw, content: RecordDict, world: Any) -> str:
    name, array = a_name(draw, content)
    kind = draw(st.sampled_from(["float64", "float16", "int64", "bool", "complex64", "uint8", ">f4", "S1"]))
    value = np.zeros(array.shape, kind)
    claims = draw(st.booleans())  # to be what was asked for
    put(content, name, like(array, npy(value)) if claims else Array(value))
    return f"'{name}'"


def not_finite(draw: Draw, content: RecordDict, world: Any) -> str:
    name, array = a_name(draw, content)
    value = array.numpy().copy().reshape(-1)
    bad = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 1e7, -1e12]))  # or absurdly large
    value[draw(st.integers(0, len(value) - 1))] = bad
    put(content, name, Array(value.reshape(array.shape)))
    return f"'{name}'"


def oversized(draw: Draw, content: RecordDict, world: Any) -> str:
    name, array = a_name(draw, content)
    put(content, name, like(array, array.data + bytes(draw(st.sampled_from([1100, 10**5, 10**7])))))
    return f"'{name}'"


def damaged(draw: Draw, content: RecordDict, world: Any) -> str:
    name, array = a_name(draw, content)
    data = array.data
    rows = [
        data[: draw(st.integers(0, len(data) - 1))],
        draw(st.binary(max_size=200)),
        b"\x93NUMPY" + draw(st.binary(max_size=200)),
        data[:6] + b"\x09\x00" + data[8:],
        HEADER,
        BOMB,
        BOMB[:30],
        pickle.dumps(Loaded()),
        huge_header(),
    ]
    put(content, name, like(array, draw(st.sampled_from(rows))))
    return f"'{name}'"


def huge_header() -> bytes:
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 8), }"
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


TAMPERS = [missing_key, unknown_key, doubled_key, shape, rank, dtype, not_finite, oversized, damaged]


@settings(max_examples=EACH, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), tamper=st.sampled_from(TAMPERS), position=st.integers(0, 2))
@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_a_malformed_array_is_dropped_by_name_and_changes_nothing(
    strategy: Any, data: Any, tamper: Any, position: int, world: Any
) -> None:
    found = world(strategy)
    content = found.reply(found.EVIL)
    word = tamper(data.draw, content, found)
    found.judge(lambda asked: Message(content, reply_to=asked), position, word)


def test_with_the_records_there_are_a_thousand_of_them() -> None:
    assert 2 * EACH * len(ALL) > 1000
