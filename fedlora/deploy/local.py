"""`fedlora deploy start`, `status` and `stop`: what of a deployment is on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora.deploy.known_sites import names_of
from fedlora.deploy.processes import Part, end, parts_of, server_of
from fedlora.deploy.superlink import NOTE, flwr, nodes_of
from fedlora.errors import FedLoraError

UP = 60.0  # seconds for the server or a site to come up
BACK = 90.0  # seconds for a site that was killed to be let in again; Flower's SuperLink takes 60 to miss it
JOINED, TURNED_AWAY = "SuperNode ID:", "Exit Code: 305"  # what a SuperNode says when it is let in, or is not
TURN = 5.0  # seconds between two tries to be let in
LOOK = 0.5  # seconds between two looks at whether it has
SUPERLINK = "fedlora"  # as the server's config.toml calls it
GOES_ON = ("pending", "starting", "running")
OFF = ("TELEMETRY_ENABLED=0", "DISABLE_UPDATE_CHECK=1", "DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1")


def start(folder: Path, console: Console) -> None:
    """Start what does not run yet, register the sites' keys, and wait until all are connected.

    Raises:
        FedLoraError: a part ended at once, or was not up in time; names it and its log.
    """
    (server, sites), at = parts_of(folder), server_of(folder)
    for part in server:
        _started(part, console)
        if part.name == "superlink" and at is not None:
            _until(lambda: _listens(at), part, "does not listen")
    if at is not None:  # a site that starts before its key is known is turned away
        console.print(register(folder), highlight=False, markup=False)
    begun = [(part, offset) for part in sites if (offset := _started(part, console)) is not None]
    for part, offset in begun:
        _joined(part, offset, console)
    if at is None:
        return
    _use(at)
    for part in sites:
        _until(lambda: part.name in _online(at), part, "is not connected")  # noqa: B023 (called at once)
    console.print(f"up; next: . {_shown(at / 'env.sh')}, then fedlora deploy check ...", soft_wrap=True)


def stop(folder: Path, console: Console) -> None:
    """Stop the runs that go on, then the sites, their workers and the server, by their pid files."""
    (server, sites), at = parts_of(folder), server_of(folder)
    if at is not None and _listens(at):
        _use(at)
        for run in _runs():
            if run["status"] in GOES_ON:
                flwr(["stop", str(run["run-id"]), SUPERLINK, "--format", "json"])
                console.print(f"run {run['run-id']} stopped; resume=DIR goes on with it", soft_wrap=True)
    ended = 0
    for group in (sites, server[::-1]):  # sites first, so that they take leave of the server
        running = [(part, process) for part in group if (process := part.process)]
        workers = [worker for part in group if (worker := part.worker)]
        end([*(process for _, process in running), *workers])
        for part in group:
            part.script.with_suffix(".pid").unlink(missing_ok=True)
        ended += len(running)
        for part, process in running:
            console.print(f"{part.name}: process {process.pid} ended", highlight=False)
    if not ended:
        console.print("nothing of it runs on this machine", highlight=False)


def status(folder: Path, console: Console) -> None:
    """Who is registered and connected, what runs, its last round, and where the logs are."""
    (server, sites), at = parts_of(folder), server_of(folder)
    table = Table("part", "node", "SuperLink says", "process", box=None, padding=(0, 2, 0, 0))
    for part in server:
        table.add_row(part.name, "-", "-", _process(part))
    up = at is not None and _listens(at)
    nodes, names = dict[int, str](), dict[int, str]()
    if at is not None and up:
        _use(at)
        nodes, names = nodes_of(SUPERLINK), names_of(at / "nodes.txt")
    connected = {names.get(node, f"node {node}"): (str(node), state) for node, state in nodes.items()}
    here = {part.name: part for part in sites}
    every = [*here, *(name for name in connected if name not in here)]
    for name in every:
        node, state = connected.get(name, ("-", "not registered" if up else "?"))
        table.add_row(name, node, state, _process(here[name]) if name in here else "not here")
    console.print(table)
    for part in [*server, *sites]:
        if logs := _logs(part):
            console.print(f"{part.name}: {logs}", highlight=False, soft_wrap=True, markup=False)
    if at is not None and not up:
        console.print(f"the SuperLink does not listen; start it: fedlora deploy start {_shown(folder)}")
    if at is not None and up:
        for run in _runs()[:5]:
            said = f"run {run['run-id']}: {run['status']}{_progress(at, int(run['run-id']))}"
            console.print(f"{said}; its log: flwr log {run['run-id']} {SUPERLINK}", soft_wrap=True)


def register(folder: Path) -> str:
    """Register the keys of all sites, if the SuperLink is up; what there is to say of it.

    Raises:
        FedLoraError: the SuperLink has refused one.
    """
    at = server_of(folder)
    if at is None or not _listens(at):
        return "the SuperLink is not up; deploy start, or register.sh, registers the key"
    done = subprocess.run([at / "register.sh"], capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise FedLoraError(f"register.sh: {' '.join(done.stderr.split())[:400]}")
    return done.stdout.strip()


def listening(address: str) -> bool:
    """Whether something of this machine listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except OSError:
        return False


def _listens(server: Path) -> bool:
    found = tomllib.loads((server / "flower" / "config.toml").read_text("utf-8"))
    return listening(str(found["superlink"][SUPERLINK]["address"]))


def _started(part: Part, console: Console) -> int | None:
    """Start a part unless it runs; where its log goes on, in bytes, or None where it ran already."""
    if process := part.process:
        console.print(f"{part.name}: runs already, process {process.pid}", highlight=False)
        return None
    offset = part.log.stat().st_size if part.log.exists() else 0
    with part.log.open("ab") as log:
        begun = subprocess.Popen(
            [part.script], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
    console.print(
        f"{part.name}: process {begun.pid}, log {_shown(part.log)}", highlight=False, soft_wrap=True
    )
    return offset


def _joined(part: Part, offset: int, console: Console) -> None:
    """Wait until a site's SuperNode is let in; start it again while the SuperLink takes it for another.

    A SuperNode that was killed, or whose machine was, took no leave: until it is missed, one with its key is
    turned away.

    Raises:
        FedLoraError: it has ended for another reason, or the time is over.
    """
    until, printed = time.monotonic() + BACK, False

    def said() -> str:
        return part.log.read_bytes()[offset:].decode(errors="replace")

    while True:
        try:
            return _until(lambda: JOINED in said(), part, "is not connected")
        except FedLoraError:
            if TURNED_AWAY not in said() or time.monotonic() > until:
                raise
        if not printed:
            console.print(
                f"{part.name}: turned away, as a site that was killed is for up to 60 s, and one whose key "
                f"is not registered; trying again for {BACK:g} s",
                soft_wrap=True,
                highlight=False,
            )
        printed = True
        time.sleep(TURN)
        offset = _started(part, Console(quiet=True)) or offset


def _until(up: Callable[[], bool], part: Part, what: str) -> None:
    """Wait until a part is up.

    Raises:
        FedLoraError: it has ended, or the time is over.
    """
    until = time.monotonic() + UP
    time.sleep(LOOK)  # until its script has written which process it is
    while not up():
        if part.process is None:
            raise FedLoraError(f"deploy start: {part.name} has ended; the reason is in {_shown(part.log)}")
        if time.monotonic() > until:
            raise FedLoraError(
                f"deploy start: {part.name} {what} after {UP:g} s; see {_shown(part.log)}, and say "
                "deploy start again"
            )
        time.sleep(LOOK)


def _environment() -> dict[str, str]:
    """Of the scripts: this fedlora's own commands first."""
    return os.environ | {"FEDLORA_BIN": os.environ.get("FEDLORA_BIN") or str(Path(sys.executable).parent)}


def _use(server: Path) -> None:
    """Let Flower's command find the server, as env.sh does."""
    os.environ["FLWR_HOME"] = str(server / "flower")
    os.environ.update(dict(f"FLWR_{word}".split("=") for word in OFF))


def _online(server: Path) -> set[str]:
    names = names_of(server / "nodes.txt")
    return {names[node] for node, state in nodes_of(SUPERLINK).items() if state == "online" and node in names}


def _runs() -> list[dict[str, Any]]:
    """Flower's runs, the newest first."""
    found: list[dict[str, Any]] = flwr(["list", SUPERLINK, "--format", "json"])["runs"]
    return found


def _progress(server: Path, run: int) -> str:
    """The last round of a run, by the folder that the server keeps of it."""
    for note in (server / "runs").glob(f"*/{NOTE}"):
        if json.loads(note.read_text("utf-8")).get("run") == run:
            lines = (note.parent / "metrics.jsonl").read_text("utf-8").splitlines()
            return f", round {len(lines)}, in {_shown(note.parent)}"
    return ""


def _process(part: Part) -> str:
    process, worker = part.process, part.worker
    return f"{process.pid if process else 'none'}{f', worker {worker.pid}' if worker else ''}"


def _logs(part: Part) -> str:
    found = [part.log, *([part.state / "worker.log"] if part.state else [])]
    return ", ".join(_shown(path) for path in found if path.is_file())


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
