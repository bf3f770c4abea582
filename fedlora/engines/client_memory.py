"""What clients keep between rounds, as their runtime asks for it, and as it travels to another machine.

A run keeps it in its folder (`fedlora.storage.client_state`). A group of clients that trains elsewhere is
sent what it may read, and comes back with a log of what is to be written, which the folder's owner writes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fedlora.errors import FedLoraError
from fedlora.privacy import Ledger

Found = TypeVar("Found")


class Kept(Protocol):
    """Tensors that clients keep, by round."""

    def read(self, client: int, before: int) -> Mapping[str, Tensor]:
        """The tensors that a client kept in its last round before this one."""

    def write(self, client: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as the version of a round."""


class ClientMemory(Kept, Protocol):
    """Own parameters, ledgers and counts of clients; `ClientStore` says what each method does."""

    @property
    def steps(self) -> Kept:
        """What the update steps of each client keep."""

    def ledger(self, client: int) -> Ledger | None:
        """A client's privacy ledger of this run."""

    def spend(self, client: int, before: Ledger | None, after: Ledger) -> None:
        """Replace a client's privacy ledger."""

    def answered(self, client: int) -> int:
        """The number of training requests that a client has answered."""

    def answer(self, client: int) -> None:
        """Count one more."""

    def alone(self, clients: Iterable[int]) -> AbstractContextManager[None]:
        """Keep others from training these clients meanwhile."""


class Downloads(Protocol):
    """What clients were sent and hold on to; `DownloadCache` says what each method does."""

    def held(self, client: int) -> Mapping[str, Tensor]:
        """The tensors that a client holds."""

    def hold(self, client: int, tensors: Mapping[str, Tensor], version: int | None = None) -> None:
        """Replace them."""


@dataclass
class ClientCopy:
    """What one client may read. An error in the place of a value is raised when it is asked for.

    Args:
        kept: its own tensors.
        steps: what its update steps kept.
        ledger: its ledger.
        answered: how many requests it has answered.
        held: what it was sent and holds.
    """

    kept: Mapping[str, Tensor] | FedLoraError
    steps: Mapping[str, Tensor] | FedLoraError
    ledger: Ledger | FedLoraError | None
    answered: int | FedLoraError
    held: Mapping[str, Tensor]

    @classmethod
    def of(cls, client: int, round: int, memory: ClientMemory, downloads: Downloads) -> "ClientCopy":
        """A client's copy for a round."""
        return cls(
            _tried(lambda: memory.read(client, round)),
            _tried(lambda: memory.steps.read(client, round)),
            _tried(lambda: memory.ledger(client)),
            _tried(lambda: memory.answered(client)),
            downloads.held(client),
        )


@dataclass
class CarriedMemory:
    """The memory of clients away from their folder: reads copies, and logs what is to be written.

    Args:
        copies: by client.
        log: method of `ClientMemory` and its arguments, in order, by client.
    """

    copies: dict[int, ClientCopy]
    log: dict[int, list[tuple[str, tuple[Any, ...]]]] = field(default_factory=lambda: defaultdict(list))

    def read(self, client: int, before: int) -> Mapping[str, Tensor]:
        """The tensors that a client kept."""
        return _given(self.copies[client].kept)

    def write(self, client: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Log tensors as the version of a round."""
        if tensors:
            self.log[client].append(("write", (round, dict(tensors))))

    @property
    def steps(self) -> Kept:
        """What the update steps of each client keep."""
        return _CarriedSteps(self)

    def ledger(self, client: int) -> Ledger | None:
        """A client's privacy ledger, with what it has spent here."""
        return _given(self.copies[client].ledger)

    def spend(self, client: int, before: Ledger | None, after: Ledger) -> None:
        """Log a ledger in the place of the one before."""
        self.copies[client].ledger = after
        self.log[client].append(("spend", (before, after)))

    def answered(self, client: int) -> int:
        """The number of training requests that a client has answered."""
        return _given(self.copies[client].answered)

    def answer(self, client: int) -> None:
        """Log one more."""
        self.copies[client].answered = self.answered(client) + 1
        self.log[client].append(("answer", ()))

    def alone(self, clients: Iterable[int]) -> AbstractContextManager[None]:
        """Nothing: whoever has sent the copies keeps others from these clients."""
        return nullcontext()

    def held(self, client: int) -> Mapping[str, Tensor]:
        """The tensors that a client was sent and holds."""
        return self.copies[client].held

    def hold(self, client: int, tensors: Mapping[str, Tensor], version: int | None = None) -> None:
        """Nothing: it follows from what was sent, which the sender knows."""


@dataclass(frozen=True)
class _CarriedSteps:
    """What update steps keep, in the copies and the log of a carried memory."""

    memory: CarriedMemory

    def read(self, client: int, before: int) -> Mapping[str, Tensor]:
        return _given(self.memory.copies[client].steps)

    def write(self, client: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            self.memory.log[client].append(("steps.write", (round, dict(tensors))))


def replay(log: Sequence[tuple[str, tuple[Any, ...]]], client: int, memory: ClientMemory) -> None:
    """Write what a client has logged elsewhere.

    Raises:
        FedLoraError: as the methods of the memory; what follows in the log is not written.
    """
    for method, arguments in log:
        attrgetter(method)(memory)(client, *arguments)


def _tried(read: Callable[[], Found]) -> Found | FedLoraError:
    try:
        return read()
    except FedLoraError as error:
        return error


def _given(value: Found | FedLoraError) -> Found:
    if isinstance(value, FedLoraError):
        raise value
    return value
