import io
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedlora.core.messages import Peer, Task
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import LARGEST, read_update

NAME = "a.q.A"
GOOD = np.ones((4, 8), np.float32)


def with_array(wire: Any, value: Any, name: str = NAME) -> RecordDict:
    content = wire.honest(Task(wire.adapter()))
    arrays = dict(content.array_records["arrays"])
    arrays[name] = value
    content["arrays"] = ArrayRecord(arrays)
    return content


def claimed(data: bytes, like: np.ndarray | None = None, stype: str = "numpy.ndarray") -> Array:
    """An array that says it is what was asked for, over any bytes."""
    like = np.zeros((4, 8), np.float32) if like is None else like
    return Array(dtype=str(like.dtype), shape=like.shape, stype=stype, data=data)


def npy(value: np.ndarray, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        np.ones((4, 9), np.float32),
        np.ones((5, 8), np.float32),  # another rank
        np.ones((8, 4), np.float32),
        np.ones((1, 8), np.float32),  # would broadcast
        np.ones((32,), np.float32),
        np.array(1.0, np.float32),
        np.ones((0, 8), np.float32),
        np.ones((4, 8), np.float64),
        np.ones((4, 8), np.float16),
        np.ones((4, 8), np.int64),
        np.ones((4, 8), np.complex64),
        np.ones((4, 8), np.bool_),
        GOOD * np.nan,
        np.where(np.eye(4, 8) > 0, np.inf, 0).astype(np.float32),
        GOOD * np.float32(LARGEST),
        GOOD * np.float32(3e38),  # whose norm overflows in float32
    ],
    ids=lambda v: f"{v.dtype}{v.shape}",
)
def test_a_wrong_tensor_is_refused_by_name(value: np.ndarray, wire: Any) -> None:
    assert NAME in wire.refused(with_array(wire, Array(value)))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_an_update_of_another_rank_is_refused(rank: int, wire: Any) -> None:
    assert "a.q" in wire.refused(wire.honest(Task(wire.adapter(rank))))


@pytest.mark.parametrize(
    "value",
    [
        claimed(npy(np.ones((2, 8), np.float32))),  # fewer than said
        claimed(npy(np.ones((4, 8), np.float64))),
        claimed(npy(np.ones((4, 8), ">f4"))),
        claimed(npy(GOOD)[:-3]),
        claimed(npy(GOOD)[:20]),
        claimed(b""),
        claimed(b"\x00"),
        claimed(b"\x93NUMPY"),
        claimed(b"no array at all"),
        claimed(npy(np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)),
        claimed(npy(np.zeros((4, 8), [("x", "f4")]))),
        claimed(npy(np.full((4, 8), "x"))),
        claimed(npy(GOOD), stype="torch.save"),
    ],
)
def test_bytes_that_belie_their_header_are_refused(value: Array, wire: Any) -> None:
    assert NAME in wire.refused(with_array(wire, value))


def archive(**members: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"PK\x03\x04", b"PK\x05\x06" + bytes(18), archive(x=GOOD), archive(x=GOOD)[:40]],
    ids=["zip-magic", "empty-zip", "npz", "torn-npz"],
)
def test_a_zip_in_place_of_an_array_is_refused(data: bytes, wire: Any) -> None:
    assert NAME in wire.refused(with_array(wire, claimed(data)))


def test_a_header_that_asks_for_more_memory_than_there_is_is_refused(wire: Any) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 8), }"
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert NAME in wire.refused(with_array(wire, claimed(data)))


class Bomb:
    """Unpickling it is seen."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a reply was unpickled",)


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_unpickled(wrapped: bool, wire: Any) -> None:
    data = pickle.dumps(Bomb())
    if wrapped:
        data = npy(np.array([Bomb()], dtype=object), allow_pickle=True)
    assert NAME in wire.refused(with_array(wire, claimed(data)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), put=st.integers(0, 255), cut=st.integers(0, 300), more=st.binary(max_size=20))
@example(at=0, put=ord("P"), cut=300, more=b"")
def test_damaged_bytes_are_refused_or_read_as_sound_numbers(
    at: int, put: int, cut: int, more: bytes, respond: Any, wire: Any
) -> None:
    data = bytearray(npy(GOOD))
    data[at] = put
    reply = respond(with_array(wire, claimed(bytes(data[:cut]) + more)))
    said, A = "", torch.zeros(4, 8)
    try:
        A = read_update(reply, Task(wire.adapter()), Peer(0, 4), 3).adapter.pairs["a.q"].A
    except IncompatibleUpdates as error:
        said = str(error)
    assert not said or NAME in said
    assert A.shape == (4, 8)
    assert A.dtype == torch.float32
    assert bool(torch.isfinite(A).all())


def test_a_zip_is_never_opened(monkeypatch: pytest.MonkeyPatch, wire: Any) -> None:
    """`np.load` opens archives lazily; a bomb must not come so far."""
    data = archive(x=GOOD)
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *a, **k: pytest.fail("an archive was opened"))
    wire.refused(with_array(wire, claimed(data)))
