"""Flower's SuperLink, by the `flwr` command alone: submit a run, hear its log, ask who is there.

What is submitted is a bundle of one file that imports the installed fedlora, with the composed configuration
as one string. Nothing here imports torch, which would take longer than Flower's answer.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import fedlora
from fedlora.errors import ConfigError, FedLoraError

NOTE = "deploy.json"  # in a run's folder: the SuperLink, and the number of Flower's run
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

from fedlora.deploy.flower_app import client, server

__all__ = ["client", "server"]
'''


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
            if status_of(superlink, run).startswith("finished"):
                return
            until = time.monotonic() + PATIENCE
        except FedLoraError:
            if time.monotonic() > until:
                raise
        time.sleep(PAUSE)


def nodes_of(superlink: str) -> dict[int, str]:
    """The registered nodes of a SuperLink: registered (and never connected), online or offline.

    Raises:
        FedLoraError: the SuperLink cannot be reached.
    """
    found = flwr(["supernode", "list", superlink, "--format", "json"])["nodes"]
    return {int(node["node-id"]): str(node["status"]) for node in found}


def status_of(superlink: str, run: int) -> str:
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
