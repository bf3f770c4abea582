import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.cli.main import main
from fedlora.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow  # whole runs

JOB = ("strategy=flexlora", "ranks=[2,4]", "rounds=4", "clients_per_round=2", "evaluate.clients=true")


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


@pytest.fixture(scope="session")
def whole(run: Callable[..., Any]) -> Any:
    """The run that nothing interrupted."""
    return run(*JOB)


def killed_at(call: str, number: int, before: bool, patch: pytest.MonkeyPatch) -> None:
    """Die at the n-th call of a function that writes, before it or after it."""
    import fedlora.storage.run_folder as module

    owner: Any = module if hasattr(module, call) else RunFolder
    real, calls = getattr(owner, call), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and before:
            raise Killed
        made = real(*args, **kwargs)
        if calls[0] == number:
            raise Killed
        return made

    patch.setattr(owner, call, dying)


INSTANTS = {
    "before the lines of round 1": ("finish_round", 1, True),
    "before the lines of round 3": ("finish_round", 3, True),
    "between the two logs": ("_append", 3, False),
    "between lines and checkpoint": ("save_state", 4, True),
    "after a checkpoint": ("finish_round", 2, False),
    "after the last checkpoint": ("finish_round", 4, False),
    "before the summary": ("write_json", 1, True),
    "after the config, before any checkpoint": ("save_state", 1, True),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_run_killed_at_any_instant_goes_on(
    instant: str, whole: Any, run: Callable[..., Any], result: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(*INSTANTS[instant], patch)
        with pytest.raises(Killed):
            run(*JOB, out=out)
    main(["run", f"resume={out}"])
    same(result(out), whole)


def same(got: Any, want: Any) -> None:
    assert got.sha == want.sha
    assert [m["round"] for m in got.metrics] == [1, 2, 3, 4]
    assert [(c["round"], c["client"]) for c in got.clients] == [
        (c["round"], c["client"]) for c in want.clients
    ]
    for key in ("accuracy", "loss", "bytes_up", "bytes_down", "dropped", "rounds", "initial"):
        assert got.summary[key] == want.summary[key], key


@pytest.fixture
def stopped(run: Callable[..., Any], tmp_path: Path) -> Path:
    """A run that was killed after round 3 of 4."""
    with pytest.MonkeyPatch.context() as patch:
        killed_at("finish_round", 3, False, patch)
        with pytest.raises(Killed):
            run(*JOB, out=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_costs_a_round_only(stopped: Path, whole: Any, result: Any, damage: str) -> None:
    newest = max((stopped / "checkpoint").iterdir())
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data[:-9] if damage == "cut" else data)
    with pytest.warns(UserWarning, match="damaged"):
        main(["run", f"resume={stopped}"])
    same(result(stopped), whole)


def test_torn_last_lines_are_no_obstacle(stopped: Path, whole: Any, result: Any) -> None:
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (stopped / name).open("a") as file:
            file.write('{"round": 4, "lo')
    main(["run", f"resume={stopped}"])
    same(result(stopped), whole)


def test_a_folder_may_be_moved_before_it_is_continued(
    stopped: Path, whole: Any, result: Any, tmp_path: Path
) -> None:
    moved = tmp_path / "a b é" / "neu"
    moved.parent.mkdir()
    stopped.rename(moved)
    main(["run", f"resume={moved}"])
    same(result(moved), whole)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert len(said.splitlines()) == 1, said
    return said


def test_what_cannot_be_continued_says_why(whole: Any, stopped: Path, tmp_path: Path, capsys: Any) -> None:
    assert "finished its 4 rounds" in refused(["run", f"resume={whole.path}"], capsys)
    assert "rounds=N" in refused(["run", f"resume={whole.path}"], capsys)
    assert "config.yaml" in refused(["run", f"resume={tmp_path}"], capsys)
    assert "config.yaml" in refused(["run", f"resume={tmp_path / 'none'}"], capsys)
    for other in ("seed=1", "clients=4", "out=x", "strategy=fedit", "rounds=x", "+rounds=9"):
        assert other in refused(["run", f"resume={stopped}", other], capsys)
    assert "rounds" in refused(["run", f"resume={stopped}", "rounds=2"], capsys)  # 3 are done
    assert f"resume={whole.path}" in refused(["run", "model=tiny", "data=tiny", f"out={whole.path}"], capsys)


def test_more_rounds_give_what_a_longer_run_gives(
    whole: Any, run: Callable[..., Any], result: Any, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    out = tmp_path / "run"
    run(*JOB[:2], "rounds=2", *JOB[3:], out=out)
    main(["run", f"resume={out}", "rounds=4"])
    same(result(out), whole)
    # config.yaml is enough to run again, so it says 4 now.
    assert OmegaConf.load(out / "config.yaml").rounds == 4


def test_a_kill_while_rounds_are_added_can_be_continued(
    whole: Any, run: Callable[..., Any], result: Any, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    run(*JOB[:2], "rounds=2", *JOB[3:], out=out)
    with pytest.MonkeyPatch.context() as patch:
        killed_at("finish_round", 1, False, patch)
        with pytest.raises(Killed):
            main(["run", f"resume={out}", "rounds=4"])
    capsys.readouterr()
    assert "unfinished" in refused(["report", str(out)], capsys)
    main(["run", f"resume={out}"])
    same(result(out), whole)


def test_control_c_says_how_to_go_on(
    base: tuple[str, ...], tmp_path: Path, capsys: Any, result: Any, whole: Any
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        import fedlora.rounds.aggregation.base as module

        real, calls = module.read_update, [0]

        def interrupted(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == 4:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(module, "read_update", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(["run", *base, *JOB, f"out={out}"])
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "resume=" in said
    main(["run", f"resume={out}"])
    same(result(out), whole)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_kill_9(whole: Any, base: tuple[str, ...], result: Any, tmp_path: Path, share: float) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-m", "fedlora.cli.main", "run"]
    process = subprocess.Popen(
        [*words, *base, *JOB, f"out={out}"], stdout=subprocess.DEVNULL, env={**os.environ}
    )
    while not (out / "checkpoint" / "round-000000.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(share * sum(m["seconds"] for m in whole.metrics))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists() or share > 0.5
    if not (out / "summary.json").exists():
        main(["run", f"resume={out}"])
    same(result(out), whole)
