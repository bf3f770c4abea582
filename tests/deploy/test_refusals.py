"""What a real federation says where its sites cannot take part, and what it leaves behind."""

import subprocess
from pathlib import Path

import pytest
from conftest import JOB
from trial import Trial

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
