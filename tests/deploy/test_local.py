"""Sites that come later, and processes that are told apart by the files of their numbers."""

import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.cli.main import main


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    main(
        ["deploy", "init", str(tmp_path / "lab"), "--site", "north:2", "--site", "south:4", "--port", "18999"]
    )
    return tmp_path / "lab"


def test_a_site_more_has_its_own_number_port_and_key(deployment: Path, capsys: Any) -> None:
    main(["deploy", "add-site", str(deployment), "east:3"])
    main(["deploy", "add-site", str(deployment), "west"])
    assert "register" in capsys.readouterr().out  # the SuperLink is not up
    sites = {at.name: at for at in (deployment / "sites").iterdir()}
    configs = {name: tomllib.loads((at / "node.toml").read_text()) for name, at in sites.items()}
    assert {name: (one["client"], one["rank"]) for name, one in configs.items()} == {
        "north": (0, 2),
        "south": (1, 4),
        "east": (2, 3),
        "west": (3, 8),
    }
    scripts = [(at / "supernode.sh").read_text() for at in sites.values()]
    ports = {
        next(line.split()[0] for line in text.splitlines() if line.startswith("PORT=")) for text in scripts
    }
    assert len(ports) == 4
    assert len({(at / "node.key").read_bytes() for at in sites.values()}) == 4
    for name, at in sites.items():
        registered = deployment / "server" / "keys" / f"{name}.pub"
        assert registered.read_bytes() == (at / "node.key.pub").read_bytes()
        assert (at / "ca.crt").read_bytes() == (deployment / "ca" / "ca.crt").read_bytes()


@pytest.mark.parametrize("word", ["north", "Bad", "a:0"])
def test_a_site_that_cannot_be_added_is_one_line(
    deployment: Path, refused: Callable[..., str], word: str
) -> None:
    before = sorted(deployment.rglob("*"))
    assert word.partition(":")[0] in refused("deploy", "add-site", str(deployment), word)
    assert sorted(deployment.rglob("*")) == before


@pytest.mark.parametrize("verb", ["start", "status", "stop", "add-site"])
def test_a_folder_that_is_no_deployment_is_refused(
    tmp_path: Path, refused: Callable[..., str], verb: str
) -> None:
    more = ["x"] if verb == "add-site" else []
    assert "fedlora deploy init" in refused("deploy", verb, str(tmp_path / "none"), *more)


def test_stop_ends_what_the_pid_file_means_and_nobody_who_has_its_number_since(
    deployment: Path, capsys: Any
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    mine, other = subprocess.Popen(sleep), subprocess.Popen(sleep)
    try:
        written = {"north": mine, "south": other}
        for name, process in written.items():
            (deployment / "sites" / name / "supernode.pid").write_text(str(process.pid))
        long_ago = time.time() - 3600  # before that process began, so that its number was another's then
        os.utime(deployment / "sites" / "south" / "supernode.pid", (long_ago, long_ago))
        main(["deploy", "stop", str(deployment)])
        assert f"north: process {mine.pid} ended" in capsys.readouterr().out
        assert mine.poll() is not None
        assert other.poll() is None
        main(["deploy", "stop", str(deployment)])
        assert "nothing of it runs" in capsys.readouterr().out
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def test_status_of_what_is_stopped_says_how_to_start_it(deployment: Path, capsys: Any) -> None:
    main(["deploy", "status", str(deployment)])
    said = " ".join(capsys.readouterr().out.split())
    assert "north" in said
    assert "south" in said
    assert "fedlora deploy start" in said
