"""The file of a checkpoint: the state after a round, and what the scheduler needs to go on from it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedlora.core.adapter import digest
from fedlora.core.messages import State
from fedlora.storage.tensors import read_tensors


def digest_of_state(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 over a checkpoint's round, its header and the digest of its state (`State.digest`)."""
    state = digest(header["state"], sorted(tensors.items()))
    more = ";".join(header[key] for key in ("schedule", "needed") if key in header)
    text = f"{header['round']};{header['state']};{state}" + (f";{more}" if more else "")
    return hashlib.sha256(text.encode()).hexdigest()


def read_checkpoint(path: Path) -> tuple[int, State, Mapping[str, str]]:
    """The round, the state and the header of a checkpoint's file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    tensors, header = read_tensors(path, digest_of_state)
    return int(header["round"]), State.unpack(tensors, header["state"]), header


def number_of(checkpoint: Path) -> int:
    """The round in a checkpoint's name."""
    return int(checkpoint.stem.rpartition("-")[2])
