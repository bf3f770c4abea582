"""What a strategy was given in every round, kept so that another can be given the same."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.core.messages import Peer, State, Update
from fedlora.errors import CheckpointError
from fedlora.storage.tensors import read_tensors, write_tensors


class UpdateLog:
    """The folder `updates/` of a run: a file a round with the state before it and the updates it combined.

    Tasks are not kept: they are the recording strategy's own function of the state and of who asks.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "updates"

    def write(self, round: int, before: State, updates: Sequence[Update]) -> None:
        """Keep a round, whole or not at all; one that is done again takes the place of the first."""
        tensors, header = _packed("state", before)
        told = []
        for at, update in enumerate(updates):
            own, form = _packed(str(at), State(update.adapter))
            tensors |= own
            told.append({"form": form, "weight": update.weight, "peer": _of_peer(update.peer)})
        text = json.dumps({"round": round, "state": header, "updates": told})
        write_tensors(self._file(round), tensors, {"recording": text})

    def rounds(self) -> list[int]:
        """The rounds that were kept."""
        return [
            int(file.stem.removeprefix("round-")) for file in sorted(self._folder.glob("round-*.safetensors"))
        ]

    def read(self, round: int) -> tuple[State, list[Update]]:
        """The state before a round, and the updates that it combined.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            tensors, header = read_tensors(self._file(round))
            told = json.loads(header["recording"])
            updates = [
                Update(_unpacked(str(at), tensors, one["form"]).adapter, one["weight"], _peer(one["peer"]))
                for at, one in enumerate(told["updates"])
            ]
            return _unpacked("state", tensors, told["state"]), updates
        except (CheckpointError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"'{self._file(round)}', a recorded round, is damaged: {error}") from error

    def _file(self, round: int) -> Path:
        return self._folder / f"round-{round:06d}.safetensors"


def _packed(part: str, state: State) -> tuple[dict[str, Tensor], str]:
    tensors, header = state.pack()
    # A tensor that two names share could not be written.
    return {f"{part}/{name}": tensor.cpu().clone() for name, tensor in tensors.items()}, header


def _unpacked(part: str, tensors: Mapping[str, Tensor], header: str) -> State:
    own = {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
    return State.unpack(own, header)


def _of_peer(peer: Peer | None) -> list[Any] | None:
    return None if peer is None else [peer.id, peer.rank, dict(peer.ranks), dict(peer.scales)]


def _peer(told: Sequence[Any] | None) -> Peer | None:
    return None if told is None else Peer(*told)
