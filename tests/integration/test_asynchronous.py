"""Rounds without a barrier on a model: killed, with private clients, and read from Python."""

from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora.cli.main import main
from fedlora.storage.run_folder import RunFolder

JOB = ("strategy=flexlora", "ranks=[2,4,4]", "rounds=5", "scheduler=buffered", "scheduler.buffer=2")
SLOW = "engine.speeds={lognormal: 1, absent: 0.2, period: 5}"


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def test_a_run_that_is_killed_with_tasks_out_goes_on_to_the_same_adapter(
    run: Any, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = run(*JOB, SLOW), RunFolder.finish_round
    assert max(line["staleness"] for line in whole.clients) > 0

    def dying(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        if args[1] == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", dying)
        with pytest.raises(Killed):
            run(*JOB, SLOW, out=tmp_path / "killed")
    main(["run", f"resume={tmp_path / 'killed'}"])
    again = result(tmp_path / "killed")
    assert again.sha == whole.sha
    assert again.summary["virtual_seconds"] == whole.summary["virtual_seconds"]
    kept = [path.name for path in (tmp_path / "killed" / "checkpoint").glob("round-*")]
    assert len(kept) <= 4  # what clients at work were sent, and the last two


@pytest.mark.slow
def test_a_buffer_of_all_clients_is_the_synchronous_run(run: Any) -> None:
    want = run("strategy=flexlora", "ranks=[2,4,4]")
    got = run("strategy=flexlora", "ranks=[2,4,4]", "scheduler=buffered", "scheduler.buffer=3", SLOW)
    assert got.sha == want.sha
    assert got.summary["virtual_seconds"] > 0
    assert "virtual_seconds" not in want.summary


def test_python_reads_the_scheduler_and_the_speeds_of_a_run(run: Any) -> None:
    found = fl.open(run(*JOB, SLOW, "rounds=1").path).spec
    assert found.scheduler == fl.schedulers.Buffered(buffer=2)
    assert found.engine.speeds == {"lognormal": 1, "absent": 0.2, "period": 5}


@pytest.mark.slow
def test_every_training_of_a_private_client_is_in_its_ledger(run: Any) -> None:
    private = ("privacy=dp_sgd", "privacy.epsilon=8", "privacy.clip=1", "evaluate.rows=test")
    ran = run(*JOB, SLOW, "client.steps=2", *private)
    entries = {int(k): one["entries"] for k, one in ran.summary["ledger"]["clients"].items()}
    trained = [line["client"] for line in ran.clients if line["status"] == "ok"]
    for client, own in entries.items():
        assert sum(entry["steps"] for entry in own) == 2 * trained.count(client)
    assert ran.summary["epsilon"] <= 8
