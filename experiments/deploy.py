"""The user's side of a deployment: submit a run to a SuperLink, follow it, and bring back what it leaves.

It speaks to Flower by the `flwr` command alone. What is submitted is a bundle of one file that imports the
installed fedlora, with the composed configuration as one string.
"""

import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import fedlora
from fedlora.engine import Listener, Progress, RunFolder
from fedlora.errors import CheckpointError, ConfigError, FedLoraError

from .node import check_name
from .targets import kept

NOTE = "deploy.json"  # in a run's folder: the SuperLink, and the number of Flower's run
ALIVE = ("pending", "starting", "running", "finished:completed")
PAUSE = 2.0  # seconds between two tries to read a log that was cut off
PATIENCE = 600.0  # seconds for which a SuperLink may be away

PYPROJECT = f"""[project]
name = "fedlora-app"
version = "{fedlora.__version__}"
description = "fedlora, as installed on every machine"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlora"

[tool.flwr.app.components]
serverapp = "fedlora_app:server"
clientapp = "fedlora_app:client"

[tool.flwr.app.config]
config = ""
verb = "run"
"""
APP = '''"""Everything is in the fedlora that is installed on this machine."""

from fedlora.experiments.flower_app import client, server

__all__ = ["client", "server"]
'''


def deploy(config: DictConfig, path: Path, console: Console) -> Path:
    """Run a federation over the sites behind a SuperLink, or go on with one.

    Args:
        config: composed, every reference resolved.
        path: the run's folder on this machine.
        console: where to show progress.

    Returns:
        The folder.

    Raises:
        FedLoraError: the SuperLink cannot be reached, or the run failed there; says why.
    """
    superlink, note, folder = superlink_of(config), path / NOTE, RunFolder(path)
    if fresh := config.resume is None:
        config.engine.experiment = config.engine.experiment or _named(path)
        check_name(str(config.engine.experiment))
        RunFolder.create(path, kept(config))
    else:
        folder.write_config(kept(config))
    known = json.loads(note.read_text("utf-8")) if note.exists() else {}
    run = known.get("run") if known.get("superlink") == superlink else None
    again = (path / "summary.json").exists()  # it has finished before, and has rounds added
    follower = _Follower(config.rounds, path, console)
    try:
        if run is None or again or _status(superlink, run) not in ALIVE:
            run = submit(config, "run", superlink)
            folder.write_json(NOTE, {"superlink": superlink, "run": run})
        console.print(
            f"run {run} on SuperLink {superlink}; its log: flwr log {run} {superlink}",
            highlight=False,
            soft_wrap=True,
        )
        follower.follow(superlink, run)
    except KeyboardInterrupt:
        if run is None:
            raise
        raise KeyboardInterrupt(
            f"the run goes on at the server without this command; fedlora run resume={path} follows it "
            f"again, flwr stop {run} {superlink} ends it"
        ) from None
    finally:
        if fresh and (follower.futile or run is None):
            folder.discard(NOTE)  # nothing was done in it, and its name is free for the next try
    return path


def _named(path: Path) -> str:
    """A name for the folders at server and sites, which no other run has."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in path.resolve().name)
    return f"{plain}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def superlink_of(config: DictConfig) -> str:
    """The SuperLink's name in Flower's configuration."""
    if OmegaConf.is_missing(config.engine, "superlink"):
        raise ConfigError(
            "engine.superlink: needs the name of a SuperLink in Flower's config.toml, got none; `fedlora "
            "deploy init` writes one, FLWR_HOME says where Flower looks for it"
        )
    return str(config.engine.superlink)


def submit(config: DictConfig, verb: str, superlink: str) -> int:
    """Start a run of the bundle; the number that Flower gives it."""
    sent = config.copy()
    sent.out = sent.resume = None
    with tempfile.TemporaryDirectory() as folder:
        bundle, given = Path(folder) / "fedlora-app", Path(folder) / "given.toml"
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(PYPROJECT, "utf-8")
        (bundle / "fedlora_app.py").write_text(APP, "utf-8")
        # A JSON string is a TOML string.
        text = f"config = {json.dumps(OmegaConf.to_yaml(sent))}\nverb = {json.dumps(verb)}\n"
        given.write_text(text, "utf-8")
        words = ["run", str(bundle), superlink, "--run-config", str(given), "--format", "json"]
        return int(flwr(words)["run-id"])


def heard(superlink: str, run: int) -> Generator[str, None, None]:
    """The lines of a run's log, until it has ended; where it was cut off, again from its beginning."""
    until = time.monotonic() + PATIENCE
    while True:
        words = [_command(), "log", str(run), superlink, "--stream"]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as log:
            assert log.stdout is not None
            try:
                yield from log.stdout
            finally:
                log.terminate()
        try:
            if _status(superlink, run).startswith("finished"):
                return
            until = time.monotonic() + PATIENCE
        except FedLoraError:
            if time.monotonic() > until:
                raise
        time.sleep(PAUSE)


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
        listener, progress, failed = Listener(self._path), _Later(self._console), None
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
            f"the server stopped before the run had ended ({_status(superlink, run)}); fedlora run "
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


def nodes_of(superlink: str) -> dict[int, str]:
    """The registered nodes of a SuperLink: registered (and never connected), online or offline.

    Raises:
        FedLoraError: the SuperLink cannot be reached.
    """
    found = flwr(["supernode", "list", superlink, "--format", "json"])["nodes"]
    return {int(node["node-id"]): str(node["status"]) for node in found}


def _status(superlink: str, run: int) -> str:
    """What Flower says of a run: pending, starting, running, or finished:completed, failed, stopped."""
    runs = flwr(["list", superlink, "--run-id", str(run), "--format", "json"])["runs"]
    return str(runs[0]["status"]) if runs else "unknown"


def flwr(words: list[str]) -> dict[str, Any]:
    """What the `flwr` command answers, which is JSON.

    Raises:
        FedLoraError: it failed; with what it said, in one line.
    """
    done = subprocess.run([_command(), *words], capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {}
    if done.returncode or not found.get("success"):
        said = found.get("error-message") or done.stderr or done.stdout
        raise FedLoraError(f"flwr {words[0]}: {' '.join(str(said).split())[:400]}")
    return found


def _command() -> str:
    """Flower's command, beside this interpreter's."""
    beside = Path(sys.executable).with_name("flwr")
    found = str(beside) if beside.exists() else shutil.which("flwr")
    if found is None:
        raise ConfigError("engine=deploy: Flower's command `flwr` is not there; is flwr installed?")
    return found
