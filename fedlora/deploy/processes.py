"""Which processes of this machine are parts of a deployment, by the files that its scripts write."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedlora.errors import ConfigError

SERVER = ("superlink", "superexec", "nginx")  # in the order in which they start
PATIENCE = 15.0  # seconds for a process to end by itself
APART = 2.0  # seconds by which the time of a file and that of a process may differ


@dataclass(frozen=True)
class Part:
    """A part of a deployment that a script runs.

    Args:
        name: superlink, superexec or nginx; or the name of a site.
        script: what runs it, in the part's own folder.
    """

    name: str
    script: Path

    @property
    def log(self) -> Path:
        """Where `fedlora deploy start` lets it write."""
        return self.script.with_suffix(".log")

    @property
    def process(self) -> psutil.Process | None:
        """Its process, if it runs."""
        return process_of(self.script.with_suffix(".pid"))

    @property
    def worker(self) -> psutil.Process | None:
        """The process that keeps a site's model loaded, if there is one."""
        return None if (state := self.state) is None else process_of(state / "worker" / "pid")

    @property
    def state(self) -> Path | None:
        """A site's own folder for what it keeps; None of a part of the server, or where none is named."""
        file = self.script.with_name("node.toml")
        try:
            state = tomllib.loads(file.read_text("utf-8")).get("state")
        except (OSError, tomllib.TOMLDecodeError):
            return None
        return None if state is None else file.parent / Path(str(state)).expanduser()


def server_of(folder: Path) -> Path | None:
    """The server's folder of a deployment; None where there are sites alone."""
    return next((at for at in (folder / "server", folder) if (at / "superlink.sh").is_file()), None)


def parts_of(folder: Path) -> tuple[list[Part], list[Part]]:
    """The parts of the server, and the sites, whose folders are here.

    Args:
        folder: what `fedlora deploy init` wrote, or the folder of its server, or of one site.

    Raises:
        ConfigError: it is none of them.
    """
    folder, found = folder.absolute(), list[Part]()
    if at := server_of(folder):
        found = [Part(name, at / f"{name}.sh") for name in SERVER if (at / f"{name}.sh").is_file()]
    scripts = [folder / "supernode.sh", *sorted(folder.glob("sites/*/supernode.sh"))]
    sites = [Part(script.parent.name, script) for script in scripts if script.is_file()]
    if not found and not sites:
        raise ConfigError(f"deploy: expected a folder that `fedlora deploy init` wrote, got '{folder}'")
    return found, sites


def process_of(file: Path) -> psutil.Process | None:
    """The process whose number is in a file, unless it has ended and another has got its number since."""
    try:
        process = psutil.Process(int(file.read_text("utf-8")))
        began, written = process.create_time(), file.stat().st_mtime
        if began > written + APART or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except (OSError, ValueError, psutil.Error):
        return None
    return process


def end(processes: Sequence[psutil.Process]) -> None:
    """End processes and all that they have started: by SIGTERM, and what is left after a while by SIGKILL."""
    every = list(processes)
    for process in processes:
        try:
            every += process.children(recursive=True)
        except psutil.Error:
            continue
    for process in processes:
        if process.pid != os.getpid():
            _signalled(process, kill=False)
    _, left = psutil.wait_procs(every, PATIENCE)
    for process in left:
        _signalled(process, kill=True)
    psutil.wait_procs(left, PATIENCE)


def _signalled(process: psutil.Process, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as error:
        raise ConfigError(
            f"deploy stop: process {process.pid} is another user's; stop it as that user"
        ) from error
