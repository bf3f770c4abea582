"""Files of tensors: what comes back is what was written, any damage is refused, and the format stays."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedlora.core.messages import Peer, State, Update
from fedlora.errors import CheckpointError
from fedlora.storage.client_state import ClientStore
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.tensors import read_tensors, write_tensors
from fedlora.storage.update_log import UpdateLog

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1, dtype=torch.int64)}


@pytest.fixture
def state(make, rng) -> State:
    return State(make.adapter(rng, {"m": (4, 6)}, 2, 1.5, torch.float32), round=3)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    strided = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    write_tensors(tmp_path / "f", {**TENSORS, "t": strided}, {"note": "as it is"})
    tensors, texts = read_tensors(tmp_path / "f")
    assert texts == {"note": "as it is"}
    assert tensors.keys() == {"a", "b", "t"}
    assert torch.equal(tensors["t"], strided)
    assert all(
        torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in TENSORS.items()
    )


def test_every_flipped_bit_and_every_lost_byte_is_noticed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "f", TENSORS, {"note": "n"})
    whole = (tmp_path / "f").read_bytes()
    for at in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            tensors, texts = read_tensors(tmp_path / "f")
        except CheckpointError:
            continue
        # The bit was of a key of the header, which its reader misses: no text and no tensor has changed.
        assert [*texts.values()] == ["n"]
        assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    for length in range(0, len(whole), 7):
        (tmp_path / "f").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_tensors(tmp_path / "f")


def test_a_file_that_is_missing_or_has_no_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path / "f")
    save_file(TENSORS, tmp_path / "f")
    with pytest.raises(CheckpointError, match="its digest does not match"):
        read_tensors(tmp_path / "f")


def sha(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """The digest of the first release, by hand."""
    found = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode() + t.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_an_update_keeps_the_version_it_started_from_and_one_recorded_before_there_were_any_has_none(
    tmp_path: Path, state: State
) -> None:
    log = UpdateLog(tmp_path)
    log.write(4, state, [Update(state.adapter, 2.0, Peer(at, 2), version=at) for at in (2, 3)])
    assert [update.version for update in log.read(4)[1]] == [2, 3]
    file = tmp_path / "updates" / "round-000004.safetensors"
    tensors, texts = read_tensors(file)
    recording = json.loads(texts["recording"])
    for one in recording["updates"]:
        del one["version"]
    write_tensors(file, tensors, {"recording": json.dumps(recording)})
    assert [(update.weight, update.version) for update in log.read(4)[1]] == [(2.0, None)] * 2


def test_the_digests_of_the_three_kinds_of_files_stay(tmp_path: Path, state: State) -> None:
    ClientStore(tmp_path).write(1, 2, TENSORS)
    kept = header(tmp_path / "client-1" / "round-000002.safetensors")
    assert kept == {"digest": sha("", TENSORS)}

    log = UpdateLog(tmp_path)
    log.write(4, state, [Update(state.adapter, 2.0, Peer(0, 2))])
    kept = header(tmp_path / "updates" / "round-000004.safetensors")
    tensors = {f"state/{n}": t for n, t in state.pack()[0].items()}
    tensors |= {f"0/{n}": t for n, t in State(state.adapter).pack()[0].items()}
    assert kept.keys() == {"recording", "digest"}
    assert kept["digest"] == sha(kept["recording"], tensors)

    run = RunFolder.create(tmp_path / "run", "seed: 1\n")
    run.save_state(5, state)
    kept = header(run.last_checkpoint)
    assert kept.keys() == {"round", "state", "digest"}
    whole = f"5;{kept['state']};{sha(kept['state'], state.pack()[0])}"
    assert kept["digest"] == hashlib.sha256(whole.encode()).hexdigest()
