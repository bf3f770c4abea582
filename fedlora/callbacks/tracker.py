"""Trackers: a run's numbers, a round at a time, where other tools look for them.

A tracker is a copy for the eye: everything is in the run's own files first, and one that fails never stops a
run. What is written here lies below the run's folder, in `tracking/`; where a server is meant, its address
comes from the tool's own environment (WANDB_BASE_URL, MLFLOW_TRACKING_URI), never from a configuration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.callbacks.base import Callback, RunHandle
from fedlora.errors import ConfigError
from fedlora.storage.atomic import write_whole

PLACES = ("round", "client")  # what a number is of, and no number itself


@dataclass(kw_only=True)
class Tracker(Callback, ABC):
    """A callback that copies numbers to another tool, for as long as that works.

    Subclasses write `begin`, `round` and `end`. When one of these raises, the user is told once, and the
    tracker is asked no more in this run.

    Args:
        clients: whether every client's own numbers go, too.
    """

    clients: bool = False
    _failed: bool = field(default=False, init=False, repr=False)

    @abstractmethod
    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """A run begins, or goes on after so many rounds; `folder` is for the tracker's own files."""

    @abstractmethod
    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a round."""

    def end(self, numbers: Mapping[str, float]) -> None:
        """The run has ended, with these numbers in all; with none it was cut off."""

    def on_run_begin(self, run: RunHandle) -> None:
        """Begin in the folder `tracking` of the run."""
        self._failed = False
        self._try(run, lambda: self.begin(_folder(run), run.config, run.done))

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        """Copy the round's numbers, and its clients' if they are asked for."""
        found = numbers(metrics)
        for line in run.clients if self.clients else ():
            found |= {f"client/{line['client']}/{name}": value for name, value in numbers(line).items()}
        self._try(run, lambda: self.round(int(metrics["round"]), found))

    def on_run_end(self, run: RunHandle, summary: Mapping[str, Any]) -> None:
        """Copy the summary's numbers."""
        self._try(run, lambda: self.end(numbers(summary)))

    def _try(self, run: RunHandle, tell: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            tell()
        except Exception as error:  # trackers are other people's code, networks and disks
            self._failed, name = True, type(self).__name__
            why = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, ImportError):
                why += f"; pip install 'fedlora[{name.lower()}]'"
            run.warn(f"track: {name} failed, the run goes on without it: {why}")


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line is a number."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in PLACES
    }


def own_id(file: Path, make: Callable[[], str]) -> str:
    """The id under which a tool knows this run, kept for when it goes on."""
    if not file.is_file():
        made = make()
        write_whole(file, lambda to: to.write_text(made, encoding="utf-8"))
    return file.read_text(encoding="utf-8")


def _folder(run: RunHandle) -> Path:
    """The folder of all trackers' files."""
    if run.path is None:
        raise ConfigError("a tracker keeps its files in the run's folder, and this run has none")
    (run.path / "tracking").mkdir(exist_ok=True)
    return run.path / "tracking"
