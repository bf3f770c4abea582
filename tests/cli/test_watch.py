"""`fedlora watch` beside a run that another process writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_lab import SMALL

from fedlora.cli.main import main
from fedlora.storage.run_folder import RunFolder


@contextmanager
def running(out: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process of its own, of which two rounds are done."""
    command = [sys.executable, "-m", "fedlora.cli.main", "run", *SMALL, *words, f"out={out}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"COLUMNS": "200"}) as process:
        try:
            while not (out / "metrics.jsonl").exists() or len(RunFolder(out).rounds()) < 2:
                assert process.poll() is None
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_it_follows_a_run_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path / "run", "rounds=6"):
        main(["watch", str(tmp_path / "run")])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[:-1]] == [f"{at}/6" for at in range(1, 7)]
    assert "finished after round 6, accuracy" in said[-1]


@pytest.mark.slow
def test_it_says_that_a_run_has_died_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "run", "rounds=200") as process:
        main(["watch", "--once", str(tmp_path / "run")])
        assert "goes on, round" in capsys.readouterr().out
        process.send_signal(signal.SIGKILL)
    with pytest.raises(SystemExit) as caught:
        main(["watch", str(tmp_path / "run")])
    assert caught.value.code == 1
    assert f"fedlora run resume={tmp_path / 'run'} goes on" in capsys.readouterr().out


def test_a_finished_run_is_shown_at_once(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    began = time.monotonic()
    main(["watch", str(finished)])
    assert time.monotonic() - began < 1
    assert "round 1/1  accuracy" in capsys.readouterr().out
    main(["watch", "--once", str(finished)])
    assert "FlexLoRA: tiny on tiny, finished" in capsys.readouterr().out


def test_a_folder_without_a_run_ends_in_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "expected the folder of a run or of several" in refused("watch", str(tmp_path))
