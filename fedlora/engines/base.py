"""The interface of an engine: where the clients of a run are, and how they are reached.

An engine is a frozen dataclass of its settings. It is asked to `run` something of which nothing is loaded
yet. An engine on this machine begins the run, makes a grid over its clients, and hands the grid to the
session, which does the rounds. An engine may also hand the whole run to another machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from flwr.serverapp import Grid
from rich.console import Console

from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import ConfigError
from fedlora.ranges import check_whole


class Session(Protocol):
    """A run that is loaded and checked, as an engine sees it."""

    @property
    def runtime(self) -> ClientRuntime:
        """The clients' side in this process."""

    @property
    def nodes(self) -> Sequence[Mapping[str, int]]:
        """One node config a client, {"client": 3, "rank": 8}."""

    def enough(self, sampled: int) -> int:
        """How many of so many sampled clients a round waits for."""

    def advance(self, clients: int) -> None:
        """Tell the callbacks that so many clients have finished."""

    def warn(self, text: str) -> None:
        """Tell the user something."""

    def run(self, grid: Grid) -> None:
        """Do the rounds that are left over a grid, and write the run's files."""


class Run(Protocol):
    """A run of which nothing is loaded yet."""

    @property
    def spec(self) -> Any:
        """Its description, a `fedlora.runner.spec.RunSpec`."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def resumed(self) -> bool:
        """Whether it goes on with what is in the folder."""

    @property
    def console(self) -> Console:
        """Where an engine that has a display of its own shows it."""

    def begin(self) -> AbstractContextManager[Session]:
        """Load and check it; its folder is held within the block."""


class Engine(ABC):
    """Where clients run. Subclasses are frozen dataclasses of their settings.

    Facts that the rounds read:
        timeout: seconds after which a round goes on without those who have not answered; None waits.
        over_select: share of clients sampled beyond `clients_per_round`, for whose number a round waits.
        min_replies: share of the sampled clients without whose good updates a round changes nothing.
        wait: seconds to wait at the beginning of a round until there are clients enough.
        tree: how many edges the server has, how many each of them has below it, and so on to the clients.
        sites: whether clients are on machines of their own, with rows of their own.
        speeds: of simulated clients in virtual time, as `fedlora.rounds.speeds.Speeds.of` takes them; None
            where time is real, or nobody asks for it.
    """

    sites: ClassVar[bool] = False

    timeout: float | None = None
    over_select: float = 0.0
    min_replies: float = 0.0
    wait: float = 0.0
    speeds: Any = None
    tree: Sequence[int] | None = None

    @abstractmethod
    def run(self, run: Run) -> None:
        """Carry out a run to its end.

        Raises:
            FedLoraError: it cannot run here, or nothing came of it.
        """


def fans(tree: Sequence[int] | None) -> tuple[int, ...]:
    """The setting `engine.tree` as numbers; empty without a tree.

    Raises:
        ConfigError: it is no list of whole numbers of at least 1.
    """
    if isinstance(tree, str | int):
        raise ConfigError(f"engine.tree: expected a list such as [4,8], 4 edges of 8 clients, got {tree!r}")
    for fan in tree or ():
        check_whole("engine.tree", fan)
    return tuple(tree or ())
