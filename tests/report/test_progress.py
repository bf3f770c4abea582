"""How far a run is, from its files alone: what is running, what has died, and what is shown of it."""

import fcntl
import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.deploy.superlink import NOTE
from fedlora.errors import CheckpointError, ConfigError
from fedlora.report.live import ending, picture, round_line
from fedlora.report.progress import BLOCK, DEPLOYED, read_all, read_progress, sparkline
from fedlora.storage.run_folder import RunFolder

SETTINGS = """
strategy: {_target_: fedlora.strategies.FlexLoRA}
model: {name: tiny}
data: {name: trec}
privacy: {epsilon: 8}
rounds: 10
min_updates: 2
"""


def line(round: int, accuracy: float, seconds: float = 2.0, **more: object) -> dict[str, object]:
    sizes = {"bytes_down": 1000, "bytes_up": 500, "clients": 2, "dropped": 1}
    scores = {"loss": 1.0, "accuracy": accuracy, "train_loss": 0.5}
    return {"round": round, **scores, **sizes, "seconds": seconds, "epsilon": round / 2, **more}


def client(round: int, number: int, **more: object) -> dict[str, object]:
    return {"round": round, "client": number, "status": "ok", **more}


def write(path: Path, name: str, lines: list[dict[str, object]], cut: str = "") -> None:
    (path / name).write_text("".join(json.dumps(one) + "\n" for one in lines) + cut)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run after three rounds; in the last of them one of three clients was dropped."""
    path = tmp_path / "run"
    RunFolder.create(path, SETTINGS)
    write(path, "metrics.jsonl", [line(1, 0.3), line(2, 0.7, 9.0), line(3, 0.6, away=["west"])])
    last = [
        client(3, 0, name="north"),
        client(3, 1, status="dropped", reason="sent NaN"),
        client(3, 2, name="south"),
    ]
    write(path, "clients.jsonl", [client(2, 0), client(2, 1), *last])
    return path


def test_a_run_whose_folder_is_held_is_running_and_one_that_nobody_holds_has_died(begun: Path) -> None:
    assert read_progress(begun).stage == "died"
    with RunFolder(begun).hold():
        assert read_progress(begun).stage == "running"
        with pytest.raises(ConfigError, match="another process"):
            RunFolder(begun).hold()
    assert "fedlora run resume=" in ending(read_progress(begun))
    (begun / "summary.json").write_text(json.dumps({"metric": "accuracy", "accuracy": 0.6}))
    assert read_progress(begun).stage == "finished"


def test_a_look_never_keeps_a_run_from_its_folder(begun: Path) -> None:
    with RunFolder(begun).hold():
        pass
    with (begun / "checkpoint" / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # what a look does, caught in the act
        looker = threading.Timer(0.07, fcntl.flock, (file, fcntl.LOCK_UN))
        looker.start()
        RunFolder(begun).hold().close()
        looker.join()


def test_its_numbers_are_those_of_its_lines(begun: Path) -> None:
    with RunFolder(begun).hold():
        run = read_progress(begun)
    assert (run.done, run.rounds, run.metric, run.best) == (3, 10, "accuracy", (2, 0.7))
    assert (run.epsilon, run.budget, run.total("bytes_up")) == (1.5, 8, 1500)
    assert run.round_seconds == 2.0  # the median, which one slow round does not move
    assert run.left == pytest.approx(7 * 2.0 - min(run.waited, 2.0))
    assert (run.named("dropped"), run.named("ok"), run.away) == (["client 1"], ["north", "south"], ["west"])
    assert run.warnings == ["round 3: client 1 dropped: sent NaN"]
    assert run.title == "FlexLoRA: tiny on trec"


def test_a_half_written_line_is_no_line(begun: Path) -> None:
    whole = read_progress(begun)
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (begun / name).open("a") as file:
            file.write('{"round": 4, "acc')
    assert read_progress(begun).metrics == whole.metrics
    assert read_progress(begun).clients == whole.clients


@pytest.mark.parametrize("clients", [1, 300, 3000])
def test_the_last_round_is_found_at_the_end_of_a_long_log(begun: Path, clients: int) -> None:
    rounds = [[client(at, number, reason="x" * 40) for number in range(clients)] for at in (1, 2, 3, 4)]
    write(begun, "clients.jsonl", [one for round in rounds for one in round], cut='{"round": 4, "cl')
    assert (begun / "clients.jsonl").stat().st_size > BLOCK or clients < 3000
    assert [one["client"] for one in read_progress(begun).clients] == list(range(clients))


def test_what_looks_wrong_is_said(begun: Path) -> None:
    write(begun, "metrics.jsonl", [line(1, 0.3), line(2, 0.3, clients=1, tail_kept=0.5, epsilon_valid=False)])
    said = " ".join(read_progress(begun).warnings)
    assert "fewer than 2 good updates: 2" in said
    assert "rank collapse" in said
    assert "epsilon is not valid" in said


def test_a_metric_of_which_nobody_said_what_is_better_has_no_best_round(begun: Path) -> None:
    lines = [{"round": at, "loss": 1.0, "spearman": at / 4, "clients": 2, "seconds": 1.0} for at in (1, 2)]
    write(begun, "metrics.jsonl", lines)  # type: ignore[arg-type]
    run = read_progress(begun)
    assert (run.metric, run.best, run.course) == ("spearman", None, [(1, 0.25), (2, 0.5)])


def test_a_folder_of_several_runs_shows_each_of_them(begun: Path) -> None:
    folder = begun.parent
    (folder / "sweep.json").write_text(json.dumps({"words": [], "jobs": ["run", "lost", "later"]}))
    (folder / "lost").mkdir()
    (folder / "lost" / "error.txt").write_text("lost: ranks: expected one rank\ntraceback")
    runs, waiting = read_all(folder)
    assert [(run.path.name, run.stage) for run in runs] == [("lost", "failed"), ("run", "died")]
    assert waiting == ["later"]
    assert ending(runs[0]).endswith("failed: ranks: expected one rank")
    console = Console(width=160)
    with console.capture() as caught:
        console.print(picture(runs, waiting))
    shown = caught.get()
    assert "not begun" in shown
    assert "0 of 3 finished" in shown


def test_a_run_that_a_server_writes_is_not_taken_for_dead(begun: Path) -> None:
    assert DEPLOYED == NOTE
    (begun / DEPLOYED).write_text(json.dumps({"superlink": "hospitals", "run": 7}))
    assert read_progress(begun).stage == "elsewhere"
    assert "run 7 on SuperLink hospitals" in ending(read_progress(begun))
    (begun / DEPLOYED).write_text(json.dumps({"run": 7}))  # the server's own
    assert read_progress(begun).stage == "died"


def test_a_line_names_who_is_missing_and_the_virtual_clock(begun: Path) -> None:
    run = read_progress(begun)
    said = round_line(run, run.metrics[-1])
    assert "round 3/10  accuracy 0.600" in said
    assert "dropped 1 (client 1)  away 1 (west)  epsilon 1.500 of 8" in said
    write(begun, "metrics.jsonl", [line(1, 0.3, virtual_seconds=99.4)])
    run = read_progress(begun)
    assert "virtual seconds 99" in round_line(run, run.metrics[-1])


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no config\.yaml"):
        read_all(tmp_path)


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([]) == ""
    long = sparkline([float(at) for at in range(1000)], 10)
    assert (len(long), long[0], long[-1]) == (10, "▁", "█")
