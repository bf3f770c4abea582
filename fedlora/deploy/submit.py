"""The user's side of a deployment: submit a run to a SuperLink, follow it, and bring back what it leaves."""

import datetime
import json
from contextlib import closing
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fedlora.callbacks.base import Callbacks, RunHandle
from fedlora.callbacks.console import ConsoleProgress
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
        shown = [ConsoleProgress(self._console)]
        handle, failed = RunHandle(self._rounds, sites=True, callbacks=shown), None
        listener, callbacks, opened = ProgressReceiver(self._path), Callbacks(handle), False
        try:
            with closing(heard(superlink, run)) as lines:
                for line in lines:
                    if (said := listener.hear(line, callbacks)) is None:
                        continue
                    what, values = said
                    if what == "opening":
                        opened = True
                        self._console.print(str(values[0]), soft_wrap=True, highlight=False, markup=False)
                        handle.done, handle.metric = int(values[1]), str(values[2])
                        handle.private = bool(values[3])
                        callbacks.run_begin()
                    elif what == "error":
                        failed = (str(values[0]), int(values[1]))
                        self.futile = not handle.metrics and (failed[1] == 2 or not opened)
                    elif what == "trace":
                        (self._path / "server-error.log").write_text(str(values[0]), "utf-8")
                    elif what == "done":
                        return
        finally:
            callbacks.run_end({})
        if failed and failed[1] == 2:
            goes_on = 0 < len(handle.metrics) < self._rounds
            more = f"; fedlora run resume={self._path} goes on" if goes_on else ""
            raise FedLoraError(f"{failed[0]}{more}")
        if failed:
            raise RuntimeError(f"{failed[0]}; its traceback is in {self._path / 'server-error.log'}")
        raise CheckpointError(
            f"the server stopped before the run had ended ({status_of(superlink, run)}); fedlora run "
            f"resume={self._path} goes on from its last round"
        )
