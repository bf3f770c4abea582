"""What clients keep between rounds: their own parameters, their privacy ledgers, and received tensors."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from torch import Tensor

from fedlora.core.adapter import digest
from fedlora.errors import CheckpointError
from fedlora.privacy import Ledger
from fedlora.privacy.ledger_files import LEDGER, read_ledger, spend
from fedlora.storage.atomic import locked, write_whole
from fedlora.storage.tensors import digest_of, read_tensors, write_tensors

BASE_DELTA = "fold/"  # prefix of the names of base delta tensors in a packed task
ANSWERED = "answered"  # the file that counts a client's trainings
STEPS = "steps"  # the folder of what update steps keep, beside those of the clients
LOCKS = 64  # lock files that all clients share
KEPT = 3  # versions: of an interrupted round, of the last checkpoint's round, and of the one before


class ClientStore:
    """The own tensors of each client, a file for each client and round, and the clients' privacy ledgers.

    A client that trains in round t reads the version of its last round before t and writes version t. A round
    that is repeated, after a crash or from an older checkpoint, therefore starts from the same tensors.

    Args:
        folder: the folder of this run's clients; it is made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, client: int, before: int) -> dict[str, Tensor]:
        """The tensors that a client kept in its last round before `before`; empty if it kept none.

        Raises:
            CheckpointError: the file is damaged.
        """
        versions = [(round, path) for round, path in self._versions(client) if round < before]
        if not versions:
            return {}
        path = versions[-1][1]
        try:
            return read_tensors(path)[0]
        except CheckpointError as error:
            raise CheckpointError(f"'{path}', a client's own parameters, is damaged: {error}") from error

    def write(self, client: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as the version of a round. All but the newest versions are removed."""
        if not tensors:
            return
        write_tensors(self._folder / f"client-{client}" / f"round-{round:06d}.safetensors", tensors)
        for _, old in [v for v in self._versions(client) if v[0] <= round][:-KEPT]:
            old.unlink()

    @property
    def steps(self) -> "ClientStore":
        """What the update steps of each client keep, likewise a file for each client and round."""
        return ClientStore(self._folder / STEPS)

    def ledger(self, client: int) -> Ledger | None:
        """A client's privacy ledger of this run; None if it has released nothing.

        A repeated round, after a crash or from an older checkpoint, is a second entry: it was released twice.

        Raises:
            CheckpointError: the ledger is damaged, so the remaining budget is unknown.
        """
        return read_ledger(self._folder / f"client-{client}" / LEDGER)

    def spend(self, client: int, before: Ledger | None, after: Ledger) -> None:
        """Replace a client's privacy ledger. It is on disk when this returns, so call it before sending.

        Args:
            client: the client's id.
            before: the ledger that was read before the client trained; None if there was none.
            after: the ledger with the steps of this training.

        Raises:
            CheckpointError: the ledger has changed since it was read, or `after` lacks a step of it.
        """
        spend(self._folder / f"client-{client}" / LEDGER, before, after)

    def answered(self, client: int) -> int:
        """The number of training requests of this run that a client has answered.

        Raises:
            CheckpointError: the file with the number is damaged.
        """
        path = self._folder / f"client-{client}" / ANSWERED
        try:
            return int(path.read_text("utf-8"))
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise CheckpointError(
                f"'{path}', the number of answered requests, is damaged: {error}"
            ) from error

    def answer(self, client: int) -> None:
        """Count one more answered request. It is on disk when this returns, so call it before sending."""
        text = f"{self.answered(client) + 1}\n"
        path = self._folder / f"client-{client}" / ANSWERED
        write_whole(path, lambda file: file.write_text(text, "utf-8"))

    @contextmanager
    def alone(self, clients: Iterable[int]) -> Iterator[None]:
        """Keep other threads and processes from training these clients for the duration of the block.

        Raises:
            CheckpointError: the file system does not support locks.
        """
        with ExitStack() as held:
            # Clients share a few lock files, so that a large group does not open one each. They are locked in
            # order, so that two groups cannot wait for each other.
            for number in sorted({client % LOCKS for client in clients}):
                held.enter_context(locked(self._folder / f"lock-{number:02d}"))
            yield

    def ledgers(self) -> dict[int, Ledger]:
        """The ledger of each client that has one, by the client's id."""
        clients = sorted(int(p.parent.name.removeprefix("client-")) for p in self._folder.glob(f"*/{LEDGER}"))
        return {client: found for client in clients if (found := self.ledger(client)) is not None}

    def _versions(self, client: int) -> list[tuple[int, Path]]:
        found = (self._folder / f"client-{client}").glob("round-*.safetensors")
        return sorted((int(path.stem.removeprefix("round-")), path) for path in found)


class DownloadCache:
    """The tensors that clients received and keep, so that the server need not send them again.

    In memory, where one process holds many clients, equal tensors are stored once, and outdated base deltas
    are dropped: a base delta that was sent to nobody since the state before the last one cannot be extended
    to the current one, and the server knows by the same rule (`forgotten`) that it has to send the whole base
    delta. A client on a machine of its own keeps its base delta in a file.

    Args:
        folder: the folder with a file for each client; None keeps the tensors in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[int, dict[str, Tensor]] = {}
        self._known: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._seals: dict[int, dict[str, str]] = {}
        self._seen: dict[str, int] = {}
        self._version = -1

    def held(self, client: int) -> dict[str, Tensor]:
        """The tensors that a client holds; none if its file is damaged, and the server sends them again."""
        if self._folder is None:
            return self._held.get(client, {})
        return self._read(client) or {}

    def hold(self, client: int, tensors: Mapping[str, Tensor], version: int | None = None) -> None:
        """Replace the tensors that a client holds.

        Args:
            client: the client's id.
            tensors: the new tensors by name.
            version: the version of the state that they come from, see `write_task`; None drops no base delta.
        """
        if self._folder is not None:
            if not tensors and not self._file(client).exists():
                return
            old = self._read(client)
            if old is None or digest_of(old, {}) != digest_of(tensors, {}):
                write_tensors(self._file(client), tensors)
            return
        seals = {name: digest("", [("", tensor)]) for name, tensor in tensors.items()}
        self._held[client] = {n: self._known.setdefault(seals[n], tensor) for n, tensor in tensors.items()}
        self._seals[client] = {name: seal for name, seal in seals.items() if name.startswith(BASE_DELTA)}
        if not tensors:
            del self._held[client]
        if version is None:
            return
        self._seen |= last_seen(self._seen, self._seals[client].values(), version)
        if version > self._version:
            self._version = version
            self._forget()

    def _forget(self) -> None:
        """Drop the base deltas that are outdated by the rule `forgotten`."""
        old = forgotten(self._seen, self._version)
        for client, seals in self._seals.items():
            for name in [name for name, seal in seals.items() if seal in old]:
                del seals[name], self._held[client][name]
        for seal in old:
            del self._seen[seal]

    def _file(self, client: int) -> Path:
        assert self._folder is not None
        return self._folder / f"client-{client}" / "held.safetensors"

    def _read(self, client: int) -> dict[str, Tensor] | None:
        """The tensors in a client's file; None if the file is missing or damaged."""
        try:
            return read_tensors(self._file(client))[0]
        except CheckpointError:
            return None


def last_seen(seen: Mapping[str, int], seals: Iterable[str], version: int) -> dict[str, int]:
    """Digest -> the last version in whose tasks it was sent, now that it was sent in one more.

    Clients may be sent tasks of an older version after those of a newer one.
    """
    return {seal: max(version, seen.get(seal, version)) for seal in seals}


def forgotten(seen: Mapping[str, int], version: int) -> set[str]:
    """The digests of outdated base deltas, which clients drop and on which the server no longer relies.

    A new base delta extends the one of the version before, or is sent whole. Server and clients use the same
    rule, so the server never relies on a base delta that a client has dropped.

    Args:
        seen: digest -> the last version of the state in whose tasks the base delta was sent.
        version: the version of the state whose tasks are now sent.
    """
    return {seal for seal, last in seen.items() if last < version - 1}
