"""The states and updates of all rounds, recorded so that another strategy can aggregate the same updates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.core.messages import Peer, State, Update
from fedlora.errors import CheckpointError
from fedlora.storage.tensors import read_tensors, write_tensors


class UpdateLog:
    """The folder `updates/` of a run: a file for each round with the state before it and the round's updates.

    Tasks are not recorded, because the recording strategy computes them from the state and the peer.

    Args:
        run: the folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "updates"

    def write(self, round: int, before: State, updates: Sequence[Update]) -> None:
        """Record a round atomically; a repeated round replaces the first recording."""
        tensors, header = _packed("state", before)
        entries = []
        for at, update in enumerate(updates):
            own, form = _packed(str(at), State(update.adapter))
            tensors |= own
            peer = _of_peer(update.peer)
            entries.append({"form": form, "weight": update.weight, "peer": peer, "version": update.version})
        text = json.dumps({"round": round, "state": header, "updates": entries})
        write_tensors(self._file(round), tensors, {"recording": text})

    def rounds(self) -> list[int]:
        """The recorded rounds."""
        return [
            int(file.stem.removeprefix("round-")) for file in sorted(self._folder.glob("round-*.safetensors"))
        ]

    def read(self, round: int) -> tuple[State, list[Update]]:
        """The state before a round, and the updates that the round aggregated.

        An update's version is None where the recording is older than versions are.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            tensors, header = read_tensors(self._file(round))
            recording = json.loads(header["recording"])
            updates = [
                Update(
                    _unpacked(str(at), tensors, one["form"]).adapter,
                    one["weight"],
                    _peer(one["peer"]),
                    version=one.get("version"),
                )
                for at, one in enumerate(recording["updates"])
            ]
            return _unpacked("state", tensors, recording["state"]), updates
        except (CheckpointError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{self._file(round)}', a recorded round, is damaged: {error}") from error

    def _file(self, round: int) -> Path:
        return self._folder / f"round-{round:06d}.safetensors"


def _packed(part: str, state: State) -> tuple[dict[str, Tensor], str]:
    tensors, header = state.pack()
    # safetensors refuses to write a tensor that has two names.
    return {f"{part}/{name}": tensor.cpu().clone() for name, tensor in tensors.items()}, header


def _unpacked(part: str, tensors: Mapping[str, Tensor], header: str) -> State:
    own = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
    return State.unpack(own, header)


def _of_peer(peer: Peer | None) -> list[Any] | None:
    return None if peer is None else [peer.id, peer.rank, dict(peer.ranks), dict(peer.scales)]


def _peer(fields: Sequence[Any] | None) -> Peer | None:
    return None if fields is None else Peer(*fields)
