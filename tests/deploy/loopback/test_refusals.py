"""What a real federation says where its sites cannot take part, and what it leaves behind."""

import signal
import subprocess
from pathlib import Path

import pytest
from trial import JOB, Trial

from fedlora.deploy.processes import process_of

pytestmark = pytest.mark.slow
ROWS = "question,topic\nw1 w2,a\nw3 w4,b\n"


def test_sites_that_refuse_are_named_and_leave_no_run(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(ROWS)
    before = sorted((trial.folder / "server" / "runs").glob("*"))
    # The sites of this trial have no file of their own, which data=sites asks for.
    words = ("data=sites", "data.test=test.csv", "data.text=question", "data.label=topic", "out=out")
    done = subprocess.run(
        trial.command("run", "engine=deploy", "engine.superlink=fedlora", *JOB, *words),
        capture_output=True, text=True, env=trial.environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    for name in trial.sites:
        assert f"{name} cannot take part: " in done.stdout
        assert f"sites/{name}/state/worker.log" in done.stdout
    assert "no client took part" in done.stderr
    assert not (tmp_path / "out").exists()
    assert sorted((trial.folder / "server" / "runs").glob("*")) == before
    said = trial.fedlora("deploy", "status", str(trial.folder))
    assert [line.split()[2] for line in said.splitlines() if line.split()[:1] in (["north"], ["south"])] == [
        "online",
        "online",
    ]


def test_a_check_names_a_site_that_refuses_before_a_model_is_loaded(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(ROWS)
    words = ("data=sites", "data.test=test.csv", "data.text=question", "data.label=topic")
    logs = [trial.folder / "sites" / name / "state" / "worker.log" for name in trial.sites]
    before = [log.read_text().count("a message could not be answered") for log in logs]
    done = subprocess.run(
        trial.command("deploy", "check", "engine.superlink=fedlora", *JOB, *words, "model.path=/no/model"),
        capture_output=True, text=True, env=trial.environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    for name in trial.sites:
        assert f"- {name} cannot take part: " in done.stdout
    # Nobody had come to the model, which is not there.
    assert "no client took part" in done.stderr
    assert [log.read_text().count("a message could not be answered") for log in logs] == [
        count + 1 for count in before
    ]


def test_a_killed_site_is_started_again_until_it_is_let_in(trial: Trial) -> None:
    site = trial.folder / "sites" / "south"
    trial.kill("south", signal.SIGKILL)
    said = trial.fedlora("deploy", "start", str(site))
    try:
        assert "south: turned away" in said
        assert process_of(site / "supernode.pid") is not None
        status = trial.fedlora("deploy", "status", str(trial.folder))
        assert next(line for line in status.splitlines() if line.startswith("south ")).split()[2] == "online"
    finally:
        trial.fedlora("deploy", "stop", str(site))
