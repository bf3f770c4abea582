"""What clients keep between rounds: their own trained parts on disk, and what they were sent in memory."""

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

FOLD = "fold/"  # begins the name of a fold's tensor in a packed task
ANSWERED = "answered"  # the file that counts a client's trainings
LOCKS = 64  # files for the locks of all clients
KEPT = 3  # versions: of a round that was cut off, of the last checkpoint's, and of the one before that


class ClientStore:
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
        path = versions[-1][1]
        try:
            return read_tensors(path)[0]
        except CheckpointError as error:
            raise CheckpointError(f"'{path}', a client's own part, is damaged: {error}") from error

    def write(self, client: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors as of a round."""
        if not tensors:
            return
        write_tensors(self._folder / f"client-{client}" / f"round-{round:06d}.safetensors", tensors)
        for _, old in [v for v in self._versions(client) if v[0] <= round][:-KEPT]:
            old.unlink()

    def ledger(self, client: int) -> Ledger | None:
        """What a client's privacy has cost in this run so far, whichever round comes next; None for nothing.

        What was spent stays spent: a round that is done again, after a crash or from an older checkpoint, is
        paid for again.

        Raises:
            CheckpointError: the ledger is damaged, so that nobody knows what is left.
        """
        return read_ledger(self._folder / f"client-{client}" / LEDGER)

    def spend(self, client: int, before: Ledger | None, after: Ledger) -> None:
        """Write down what a client's privacy has cost; on disk when this returns, so call it before sending.

        Args:
            client: its id.
            before: its ledger as it was read before the client trained; None for nothing.
            after: its ledger from now on.

        Raises:
            CheckpointError: its ledger has changed since, or some of it is missing in `after`.
        """
        spend(self._folder / f"client-{client}" / LEDGER, before, after)

    def answered(self, client: int) -> int:
        """How many trainings of this run a client has answered.

        Raises:
            CheckpointError: the count is damaged.
        """
        path = self._folder / f"client-{client}" / ANSWERED
        try:
            return int(path.read_text("utf-8"))
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise CheckpointError(
                f"'{path}', how many trainings were answered, is damaged: {error}"
            ) from error

    def answer(self, client: int) -> None:
        """Count one more training of a client; on disk when this returns, so call it before sending."""
        text = f"{self.answered(client) + 1}\n"
        path = self._folder / f"client-{client}" / ANSWERED
        write_whole(path, lambda file: file.write_text(text, "utf-8"))

    @contextmanager
    def alone(self, clients: Iterable[int]) -> Iterator[None]:
        """Keep everyone else, in any process, from training these clients, until the block ends.

        Raises:
            CheckpointError: the folder's file system has no locks.
        """
        with ExitStack() as held:
            # Clients share a few files, so that a large group does not open one each; in order, so that two
            # groups do not wait for each other.
            for number in sorted({client % LOCKS for client in clients}):
                held.enter_context(locked(self._folder / f"lock-{number:02d}"))
            yield

    def ledgers(self) -> dict[int, Ledger]:
        """The ledger of every client that has spent anything, by its id."""
        clients = sorted(int(p.parent.name.removeprefix("client-")) for p in self._folder.glob(f"*/{LEDGER}"))
        return {client: found for client in clients if (found := self.ledger(client)) is not None}

    def _versions(self, client: int) -> list[tuple[int, Path]]:
        found = (self._folder / f"client-{client}").glob("round-*.safetensors")
        return sorted((int(path.stem.removeprefix("round-")), path) for path in found)


class DownloadCache:
    """Tensors that clients were sent and hold on to.

    In memory, for many clients of one process, equal tensors are kept once, and folds that have been replaced
    are forgotten: a fold that nobody was sent since the state before the last leads to no fold of now, and
    the server knows that it has to send the whole one (`forgotten`). Each client on a machine of its own
    keeps its one fold, in a file.

    Args:
        folder: where they outlive this process, a file a client; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[int, dict[str, Tensor]] = {}
        self._known: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._seals: dict[int, dict[str, str]] = {}
        self._seen: dict[str, int] = {}
        self._version = -1

    def held(self, client: int) -> dict[str, Tensor]:
        """What a client holds; nothing where a file is damaged, so that the server has to send it again."""
        if self._folder is None:
            return self._held.get(client, {})
        return self._read(client) or {}

    def hold(self, client: int, tensors: Mapping[str, Tensor], version: int | None = None) -> None:
        """A client holds these from now on, and nothing else.

        Args:
            client: its id.
            tensors: by name.
            version: the state that they come from, as `write_task` has it; None forgets no fold.
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
        self._seals[client] = {name: seal for name, seal in seals.items() if name.startswith(FOLD)}
        if not tensors:
            del self._held[client]
        if version is None:
            return
        self._seen |= dict.fromkeys(self._seals[client].values(), version)
        if version > self._version:
            self._version = version
            self._forget()

    def _forget(self) -> None:
        """Drop the folds that no client can be counted on to hold any more."""
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
        """The tensors in a client's file; None where there is none, or it is damaged."""
        try:
            return read_tensors(self._file(client))[0]
        except CheckpointError:
            return None


def forgotten(seen: Mapping[str, int], version: int) -> set[str]:
    """The digests of folds that a client need not hold any more once the state has come to a version.

    A later fold is built on the one of the version before, or is sent whole. Server and clients use this one
    rule, so that nothing is counted on that has been dropped.

    Args:
        seen: digest -> the last version in whose tasks a client has received it.
        version: of the state whose tasks are now sent.
    """
    return {seal for seal, last in seen.items() if last < version - 1}
