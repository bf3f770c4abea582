"""The user's side of a deployment: submit a run to a SuperLink, follow it, and bring back what it leaves."""

import datetime
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fedlora.callbacks.console import Progress
from fedlora.callbacks.remote import ProgressReceiver
from fedlora.deploy.site_config import check_name
from fedlora.deploy.superlink import NOTE, heard, status_of, submit, superlink_of
from fedlora.engines.base import Run
from fedlora.errors import CheckpointError, FedLoraError
from fedlora.storage.run_folder import RunFolder

ALIVE = ("pending", "starting", "running", "finished:completed")


def deploy(run: Run) -> None:
    """Run a federation over the sites behind a SuperLink, or go on with one.

    Args:
        run: what is asked for; its folder on this machine gets what the run leaves.

    Raises:
        FedLoraError: the SuperLink cannot be reached, or the run failed there; says why.
    """
    path, console, fresh = run.path, run.console, not run.resumed
    settings = OmegaConf.create(run.spec.settings)
    assert isinstance(settings, DictConfig)
    superlink, note, folder = superlink_of(settings), path / NOTE, RunFolder(path)
    if fresh:
        settings.engine.experiment = settings.engine.experiment or _named(path)
        check_name(str(settings.engine.experiment))
        RunFolder.create(path, OmegaConf.to_yaml(settings))
    else:
        folder.write_config(run.spec.settings)
    known = json.loads(note.read_text("utf-8")) if note.exists() else {}
    number = known.get("run") if known.get("superlink") == superlink else None
    again = (path / "summary.json").exists()  # it has finished before, and has rounds added
    follower = _Follower(run.spec.rounds, path, console)
    try:
        if number is None or again or status_of(superlink, number) not in ALIVE:
            number = submit(settings, "run", superlink)
            folder.write_json(NOTE, {"superlink": superlink, "run": number})
        console.print(
            f"run {number} on SuperLink {superlink}; its log: flwr log {number} {superlink}",
            highlight=False,
            soft_wrap=True,
        )
        follower.follow(superlink, number)
    except KeyboardInterrupt:
        if number is None:
            raise
        raise KeyboardInterrupt(
            f"the run goes on at the server without this command; fedlora run resume={path} follows it "
            f"again, flwr stop {number} {superlink} ends it"
        ) from None
    finally:
        if fresh and (follower.futile or number is None):
            folder.discard(NOTE)  # nothing was done in it, and its name is free for the next try


def _named(path: Path) -> str:
    """A name for the folders at server and sites, which no other run has."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in path.resolve().name)
    return f"{plain}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


class _Follower:
    """Shows a run's progress and brings back its files.

    Args:
        rounds: of the run, in all.
        path: the run's folder on this machine.
        console: where to show progress.
    """

    def __init__(self, rounds: int, path: Path, console: Console) -> None:
        self._rounds, self._path, self._console = rounds, path, console
        self.futile = False  # whether the server has ended without anything to go on with

    def follow(self, superlink: str, run: int) -> None:
        """Until it ends.

        Raises:
            FedLoraError: the run failed, or the server stopped.
        """
        listener, progress, failed = ProgressReceiver(self._path), _Later(self._console), None
        opened = False
        with progress, closing(heard(superlink, run)) as lines:
            for line in lines:
                if (said := listener.hear(line, progress)) is None:
                    continue
                what, values = said
                if what == "opening":
                    opened = True
                    progress.open(
                        str(values[0]), self._rounds, int(values[1]), str(values[2]), bool(values[3])
                    )
                elif what == "error":
                    failed = (str(values[0]), int(values[1]))
                    self.futile = not progress.ended and (failed[1] == 2 or not opened)
                elif what == "trace":
                    (self._path / "server-error.log").write_text(str(values[0]), "utf-8")
                elif what == "done":
                    return
        if failed and failed[1] == 2:
            more = f"; fedlora run resume={self._path} goes on" if 0 < progress.ended < self._rounds else ""
            raise FedLoraError(f"{failed[0]}{more}")
        if failed:
            raise RuntimeError(f"{failed[0]}; its traceback is in {self._path / 'server-error.log'}")
        raise CheckpointError(
            f"the server stopped before the run had ended ({status_of(superlink, run)}); fedlora run "
            f"resume={self._path} goes on from its last round"
        )


class _Later:
    """A run's display that begins when the server says what there is to show."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.ended = 0  # rounds, while this command has followed the run
        self._progress: Progress | None = None

    def __enter__(self) -> "_Later":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)

    def open(self, text: str, rounds: int, done: int, metric: str, private: bool) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
        if self._progress is None:
            self._progress = Progress(rounds, done, metric, self._console, private, True).__enter__()

    def begin(self, round: int, clients: int) -> None:
        if self._progress is not None:
            self._progress.begin(round, clients)

    def advance(self, clients: int) -> None:
        if self._progress is not None:
            self._progress.advance(clients)

    def end(self, metrics: dict[str, Any]) -> None:
        self.ended += 1
        if self._progress is not None:
            self._progress.end(metrics)

    def warn(self, text: str) -> None:
        if self._progress is not None:
            self._progress.warn(text)
        else:
            self._console.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)
