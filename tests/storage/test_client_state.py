"""What clients keep: versions of their own parts on disk, and what they were sent in memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fedlora.storage.tensors as module
from fedlora.errors import CheckpointError
from fedlora.storage.client_state import ClientStore, DownloadCache


def own(value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"m.B": torch.full((3, 2), value, dtype=dtype), "head": torch.tensor(value, dtype=dtype)}


def value(memory: ClientStore, client: int, before: int) -> float | None:
    found = memory.read(client, before)
    return float(found["head"]) if found else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_was_kept_comes_back_bit_for_bit_for_its_client_alone(tmp_path: Path, dtype: Any) -> None:
    memory = ClientStore(tmp_path / "clients")
    assert memory.read(3, 1) == {}
    assert not list(tmp_path.iterdir())  # reading makes nothing
    memory.write(3, 1, own(1 / 3, dtype))
    found = ClientStore(tmp_path / "clients").read(3, 2)
    assert found.keys() == own(1).keys()
    for name, tensor in own(1 / 3, dtype).items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == dtype
    assert memory.read(4, 2) == {}
    assert memory.read(30, 2) == {}


def test_a_round_reads_what_the_last_round_before_it_kept(tmp_path: Path) -> None:
    memory = ClientStore(tmp_path)
    for round in (2, 5, 7):
        memory.write(1, round, own(round))
    assert [value(memory, 1, before) for before in (1, 2, 3, 5, 6, 7, 8, 99)] == [
        None,
        None,
        2,
        2,
        5,
        5,
        7,
        7,
    ]


def test_a_round_that_is_done_again_starts_from_the_older_version_and_writes_over_its_own(
    tmp_path: Path,
) -> None:
    memory = ClientStore(tmp_path)
    for round in (1, 2, 3):
        memory.write(1, round, own(round))
    assert value(memory, 1, 3) == 2
    memory.write(1, 3, own(30))
    assert value(memory, 1, 3) == 2
    assert value(memory, 1, 4) == 30


def test_a_run_can_go_back_behind_a_damaged_checkpoint_in_the_middle_of_a_round(tmp_path: Path) -> None:
    """Killed in round 9, whose clients have written; checkpoint 8 is damaged: round 8 is done from 7 on."""
    memory = ClientStore(tmp_path)
    for round in range(1, 10):
        memory.write(1, round, own(round))
    assert value(memory, 1, 8) == 7
    memory.write(1, 8, own(80))
    assert value(memory, 1, 9) == 80
    memory.write(1, 9, own(90))
    assert value(memory, 1, 10) == 90


def test_few_versions_are_kept_and_no_temporary_file(tmp_path: Path) -> None:
    memory = ClientStore(tmp_path)
    for round in range(1, 20):
        for client in (1, 2):
            memory.write(client, round, own(round))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 * 3
    assert all(path.suffix == ".safetensors" for path in files)


def test_nothing_to_keep_leaves_what_was_kept(tmp_path: Path) -> None:
    memory = ClientStore(tmp_path / "clients")
    memory.write(1, 1, {})
    assert not list(tmp_path.iterdir())
    memory.write(1, 1, own(1))
    memory.write(1, 2, {})
    assert value(memory, 1, 3) == 1


def test_a_kill_while_writing_leaves_the_version_before(tmp_path: Path, monkeypatch: Any) -> None:
    memory = ClientStore(tmp_path)
    memory.write(1, 1, own(1))

    def torn(tensors: Any, path: Path, note: Any) -> None:
        save_file(tensors, path, note)
        path.write_bytes(path.read_bytes()[:-3])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", torn)
        for round in (1, 2):
            with pytest.raises(OSError, match="disk full"):
                memory.write(1, round, own(9))
    assert value(memory, 1, 2) == value(memory, 1, 3) == 1
    memory.write(1, 2, own(2))  # over what the failure left
    assert value(memory, 1, 3) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped"])
def test_a_damaged_file_is_told_and_not_taken_for_nothing(tmp_path: Path, damage: str) -> None:
    memory = ClientStore(tmp_path)
    for round in (1, 2):
        memory.write(1, round, own(round))
    path = max((tmp_path / "client-1").iterdir())
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])  # the last bit of the last number
    damaged = {"cut": whole[:-1], "empty": b"", "garbage": b"\xff" * 99, "flipped": flipped}
    path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=f"{path.name}.*damaged"):
        memory.read(1, 3)
    assert value(memory, 1, 2) == 1


def test_tensors_of_any_layout_are_kept(tmp_path: Path) -> None:
    ClientStore(tmp_path).write(1, 1, {"B": torch.arange(6.0).reshape(2, 3).T})
    assert torch.equal(ClientStore(tmp_path).read(1, 2)["B"], torch.arange(6.0).reshape(2, 3).T)


# --- the shelf ----------------------------------------------------------------------------------------------


def test_a_client_holds_what_it_was_last_given_and_nothing_else() -> None:
    shelf = DownloadCache()
    assert shelf.held(1) == {}
    shelf.hold(1, own(1))
    shelf.hold(2, own(2))
    assert shelf.held(1)["head"] == 1
    shelf.hold(1, {"other": torch.ones(2)})
    assert shelf.held(1).keys() == {"other"}
    assert shelf.held(2)["head"] == 2
    shelf.hold(1, {})
    assert shelf.held(1) == {}


def test_equal_tensors_are_in_memory_once_whoever_holds_them() -> None:
    shelf = DownloadCache()
    for client in range(5):
        shelf.hold(client, {"a": torch.ones(4, 3), "b": torch.full((2,), float(client))})
    pointers = {shelf.held(client)["a"].data_ptr() for client in range(5)}
    assert len(pointers) == 1
    assert [float(shelf.held(client)["b"][0]) for client in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 4),
        torch.ones(12),
        torch.ones(4, 3, dtype=torch.float64),
        torch.ones(4, 3) * (1 + 2**-20),
        torch.cat([torch.ones(3, 3), -torch.ones(1, 3)]),
    ],
)
def test_tensors_that_differ_in_shape_dtype_or_bits_are_not_mixed_up(other: torch.Tensor) -> None:
    shelf = DownloadCache()
    shelf.hold(1, {"a": torch.ones(4, 3)})
    shelf.hold(2, {"a": other})
    held = shelf.held(2)["a"]
    assert torch.equal(held, other)
    assert (held.shape, held.dtype) == (other.shape, other.dtype)


def test_what_nobody_holds_any_more_is_free() -> None:
    shelf = DownloadCache()
    shelf.hold(1, {"a": torch.ones(4, 3)})
    shelf.hold(2, {"a": torch.ones(4, 3)})
    shelf.hold(1, {})
    gc.collect()
    assert len(shelf._known) == 1
    shelf.hold(2, {})
    gc.collect()
    assert len(shelf._known) == 0


def test_what_is_on_the_shelf_outlives_the_process(tmp_path: Path) -> None:
    kept = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    DownloadCache(tmp_path).hold(3, kept)
    found = DownloadCache(tmp_path).held(3)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert DownloadCache(tmp_path).held(4) == {}
    DownloadCache(tmp_path).hold(3, {"a": kept["a"]})
    assert DownloadCache(tmp_path).held(3).keys() == {"a"}
    DownloadCache(tmp_path).hold(3, {})
    assert DownloadCache(tmp_path).held(3) == {}


def test_a_shelf_writes_what_is_new_alone_and_a_damaged_one_is_empty(tmp_path: Path) -> None:
    kept = {"a": torch.arange(6.0)}
    DownloadCache(tmp_path).hold(3, kept)
    (file,) = (tmp_path / "client-3").iterdir()
    before = file.stat()
    DownloadCache(tmp_path).hold(3, {"a": torch.arange(6.0)})
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert DownloadCache(tmp_path).held(3) == {}  # the server then has to send it again
    DownloadCache(tmp_path).hold(3, kept)
    assert torch.equal(DownloadCache(tmp_path).held(3)["a"], kept["a"])
