"""What clients keep between rounds: their own trained parts on disk, and what they were sent in memory."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.errors import CheckpointError
from fedlora.privacy import Ledger

LEDGER = "ledger.json"
KEPT = 3  # versions: of a round that was cut off, of the last checkpoint's, and of the one before that


class Memory:
    """Each client's own tensors, a file a client and round, and what its privacy has cost, by client.

    A client that trains in round t reads what it kept in its last round before t and writes under t, so that
    a round which is done again, after a crash or from an older checkpoint, starts from the same tensors.

    Args:
        folder: of this run; made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, client: int, before: int) -> dict[str, Tensor]:
        """What a client kept in its last round before this one; empty if it kept nothing.

        Raises:
            CheckpointError: its file is damaged.
        """
        versions = [(round, path) for round, path in self._versions(client) if round < before]
        if not versions:
            return {}
        try:
            return load_file(versions[-1][1])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{versions[-1][1]}', a client's own part, is damaged: {error}") from error

    def write(self, client: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors as of a round."""
        if not tensors:
            return
        folder = self._folder / f"client-{client}"
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / f"round-{round:06d}.safetensors"
        made = final.with_suffix(".tmp")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, made)
        with made.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(made, final)
        for _, old in [v for v in self._versions(client) if v[0] <= round][:-KEPT]:
            old.unlink()

    def ledger(self, client: int) -> Ledger | None:
        """What a client's privacy has cost in this run so far, whichever round comes next; None for nothing.

        What was spent stays spent: a round that is done again, after a crash or from an older checkpoint, is
        paid for again.

        Raises:
            CheckpointError: the ledger is damaged, so that nobody knows what is left.
        """
        path = self._folder / f"client-{client}" / LEDGER
        try:
            return Ledger.load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"'{path}', what a client has spent, cannot be read: {error}") from error

    def spend(self, client: int, ledger: Ledger) -> None:
        """Write down what a client's privacy has cost; on disk when this returns, so call it before sending.

        Raises:
            CheckpointError: something that was spent before is missing in it.
        """
        before = self.ledger(client)
        if before is not None and not ledger.covers(before):
            raise CheckpointError(f"the ledger of client {client} can only grow: {before} became {ledger}")
        folder = self._folder / f"client-{client}"
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{LEDGER}.tmp"
        with made.open("w", encoding="utf-8") as file:
            file.write(ledger.dump() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, folder / LEDGER)
        handle = os.open(folder, os.O_RDONLY)  # the new name, too
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def ledgers(self) -> dict[int, Ledger]:
        """The ledger of every client that has spent anything, by its id."""
        clients = sorted(int(p.parent.name.removeprefix("client-")) for p in self._folder.glob(f"*/{LEDGER}"))
        return {client: found for client in clients if (found := self.ledger(client)) is not None}

    def _versions(self, client: int) -> list[tuple[int, Path]]:
        found = (self._folder / f"client-{client}").glob("round-*.safetensors")
        return sorted((int(path.stem.removeprefix("round-")), path) for path in found)


class Shelf:
    """Tensors that clients were sent and hold on to; equal ones are in memory once, whoever holds them."""

    def __init__(self) -> None:
        self._held: dict[int, dict[str, Tensor]] = {}
        self._known: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()

    def held(self, client: int) -> dict[str, Tensor]:
        """What a client holds."""
        return self._held.get(client, {})

    def hold(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """A client holds these from now on, and nothing else."""
        if tensors:
            self._held[client] = {name: self._one(tensor) for name, tensor in tensors.items()}
        else:
            self._held.pop(client, None)

    def _one(self, tensor: Tensor) -> Tensor:
        seal = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        seal.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return self._known.setdefault(seal.digest(), tensor)
