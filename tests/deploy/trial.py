"""A whole federation on this machine, from what `fedlora deploy init` writes: for tests and trials."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

BIN = Path(sys.executable).parent
JOB = ("model=tiny", "data=tiny", "clients=2", "ranks=[2,4]", "strategy=flexlora", "client.steps=4")
UP = 60.0  # seconds for the server or a site to come up

Within = Callable[[str], Sequence[str]]  # from a host's name to the words before a command that runs there


class Trial:
    """SuperLink, SuperExec and a SuperNode a site, each a process group; for use in a `with` block.

    Args:
        folder: where all of it is written.
        sites: name -> rank.
        server: the address under which sites reach the server.
        within: how to run a command on a host; by default they are all this one.
        port: that sites call; None takes a free one of this machine.
    """

    def __init__(
        self,
        folder: Path,
        sites: Mapping[str, int],
        server: str = "127.0.0.1",
        within: Within = lambda host: [],
        port: int | None = None,
    ) -> None:
        self.folder, self.sites, self._within = folder, sites, within
        self._up: dict[str, subprocess.Popen[bytes]] = {}
        ports = iter(free_ports(len(sites) + 1))
        words = [f"{name}:{rank}" for name, rank in sites.items()]
        given = [word for pair in words for word in ("--site", pair)]
        port, self._proxied = port or next(ports), server != "127.0.0.1"
        self.fedlora("deploy", "init", str(folder), *given, "--server", server, "--port", str(port))
        for name in sites:
            script = folder / "sites" / name / "supernode.sh"
            script.write_text(re.sub(r"(?m)^PORT=\d+", f"PORT={next(ports)}", script.read_text()))

    def __enter__(self) -> Self:
        self.start("superlink")
        self.start("superexec")
        if self._proxied:
            self.start("nginx")
        self.register()
        for name in self.sites:
            self.start(name)
        return self

    def __exit__(self, *error: object) -> None:
        for name in [*self._up][::-1]:
            self.kill(name)

    @property
    def environment(self) -> dict[str, str]:
        """Of commands at the server."""
        off = ("TELEMETRY_ENABLED=0", "DISABLE_UPDATE_CHECK=1", "DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1")
        home = {"FLWR_HOME": str(self.folder / "server" / "flower"), "FEDLORA_BIN": str(BIN)}
        return {**os.environ, **home, **dict(word.split("=") for word in (f"FLWR_{o}" for o in off))}

    def set(self, site: str, key: str, value: str) -> None:
        """Write a line of a site's node.toml."""
        file = self.folder / "sites" / site / "node.toml"
        kept = [line for line in file.read_text().splitlines() if not re.match(rf"#? ?{key} *=", line)]
        file.write_text("\n".join([*kept, f"{key} = {value}"]) + "\n")

    def start(self, name: str) -> None:
        """Start the SuperLink, the SuperExec or a site's SuperNode."""
        host = name if name in self.sites else "server"
        at = self.folder / (f"sites/{name}" if name in self.sites else "server")
        script = at / ("supernode.sh" if name in self.sites else f"{name}.sh")
        with (self.folder / f"{name}.log").open("ab") as log:
            self._up[name] = subprocess.Popen(
                [*self._within(host), str(script)],
                stdout=log, stderr=log, env=self.environment, start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str, sign: int = signal.SIGKILL) -> None:
        """End one of them with all its children."""
        process = self._up.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        process.wait(20)

    def register(self) -> None:
        """Make the sites' keys known, once the SuperLink is up."""
        script, until = str(self.folder / "server" / "register.sh"), time.monotonic() + UP
        while True:
            done = subprocess.run(
                [*self._within("server"), script], capture_output=True, text=True, env=self.environment
            )
            if done.returncode == 0:
                return
            if time.monotonic() > until:
                raise RuntimeError(
                    f"register.sh: {done.stdout} {done.stderr}; see {self.folder}/superlink.log"
                )
            time.sleep(1)

    def fedlora(self, *words: str, timeout: float = 600) -> str:
        """Run the command at the server; what it said."""
        done = subprocess.run(
            self.command(*words),
            capture_output=True, text=True, env=self.environment, timeout=timeout,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"fedlora {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def running(self, *words: str) -> subprocess.Popen[str]:
        """The command at the server while it runs, for use in a `with` block."""
        return subprocess.Popen(
            self.command(*words),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip

    def command(self, *words: str) -> list[str]:
        """The words that run the command at the server."""
        return [*self._within("server"), str(BIN / "fedlora"), *words]

    def workers(self, site: str) -> list[int]:
        """The processes that keep a site's model loaded."""
        home = str(self.folder / "sites" / site / "state").encode()
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended meanwhile
                words = process.read_bytes().split(b"\0")
                if home in words and b"fedlora.deploy.worker" in words:
                    found.append(int(process.parent.name))
        return found


def free_ports(count: int) -> list[int]:
    """Ports of the loopback device that nobody listens on now."""
    taken = [socket.socket() for _ in range(count)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


def summary(path: Path) -> dict[str, Any]:
    """The summary of the run in a folder."""
    return json.loads((path / "summary.json").read_text())  # type: ignore[no-any-return]
