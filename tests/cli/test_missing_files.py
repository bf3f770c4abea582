"""Folders and files that are not there, or are damaged: one line that names them, by every verb."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.cli.main import main

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("export", ["--to", "TO"]),
        ("verify", []),
        ("replay", ["strategy=flexlora"]),
        ("report", []),
        ("run", ["rounds=9"]),
        ("run", ["-m"]),
        ("privacy show", []),
        ("deploy start", []),
        ("deploy status", []),
        ("deploy stop", []),
        ("deploy add-site", ["east"]),
    ],
)
@pytest.mark.parametrize("there", ["nothing", "empty", "a file", "below a file"])
def test_a_run_or_deployment_that_is_not_there_is_one_line(
    refused: Refused, tmp_path: Path, verb: str, more: list[str], there: str
) -> None:
    run = tmp_path / "run"
    if there == "empty":
        run.mkdir()
    elif there != "nothing":
        run.write_text("x")
    run = run / "x" if there == "below a file" else run
    name = f"resume={run}" if verb == "run" else str(run)
    said = refused(*verb.split(), name, *(word.replace("TO", str(tmp_path / "to")) for word in more))
    assert str(run) in said
    assert "expected" in said


@pytest.mark.parametrize(
    ("verb", "damage"),
    [
        *((verb, "config.yaml") for verb in ("export", "verify", "replay", "report", "run", "privacy show")),
        *((verb, "metrics.jsonl") for verb in ("verify", "report", "run")),
    ],
)
def test_a_damaged_run_is_one_line(
    refused: Refused, tmp_path: Path, finished: Path, verb: str, damage: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    if damage == "config.yaml":
        (run / damage).write_text("a: [")
    else:
        (run / damage).unlink()
    more = {"export": ["--to", str(tmp_path / "to")], "replay": ["strategy=fedit"], "run": ["rounds=9"]}
    name = f"resume={run}" if verb == "run" else str(run)
    assert damage in refused(*verb.split(), name, *more.get(verb, []))


@pytest.mark.parametrize("to", ["file/below", "/proc/none/below"])
def test_a_place_that_cannot_be_is_one_line(
    refused: Refused, tmp_path: Path, finished: Path, to: str
) -> None:
    (tmp_path / "file").write_text("x")
    assert "file" in to or Path("/proc").is_dir()
    said = refused("export", str(finished), "--to", str(tmp_path / to))
    assert str((tmp_path / to).parent) in said


def test_a_report_of_several_runs_is_written_into_none_of_them(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        shutil.copytree(finished, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main(["report", "../a", "../b"])
    assert "report.html" in capsys.readouterr().out.splitlines()
    assert [path for path in sorted(tmp_path.rglob("*")) if "here" not in path.parts] == before
