"""Whole private runs of the command: what they promise, write and refuse."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError
from fedlora.privacy import Entry, Ledger, epsilon

pytestmark = pytest.mark.slow  # whole runs

DP = ("privacy=dp_sgd", "privacy.accountant=rdp", "client.batch_size=4")


@pytest.fixture(scope="module")
def private(run: Any) -> Any:
    """A private run of two rounds; tests read it and copy it."""
    return run(*DP, "strategy=ffalora", "privacy.epsilon=6")


def test_epsilon_is_that_of_the_whole_run_and_the_largest_of_all(private: Any) -> None:
    summary, ledger = private.summary, private.summary["ledger"]
    found = []
    for spent in ledger["clients"].values():
        entries = tuple(Entry(e["sigma"], e["q"], e["steps"]) for e in spent["entries"])
        assert spent["epsilon"] == pytest.approx(epsilon(entries, spent["delta"], "rdp"))
        assert 0.9 * 6 < spent["epsilon"] <= 6
        found.append(spent["epsilon"])
    assert len(found) == 3
    assert summary["epsilon"] == max(found) == private.metrics[-1]["epsilon"]
    assert private.metrics[0]["epsilon"] < private.metrics[1]["epsilon"]
    assert summary["epsilon_valid"] is ledger["valid"] is True
    assert summary["delta"] == 1e-5
    assert ledger["unit"] == "record"
    assert "adding or removing one record" in ledger["adjacency"]


def test_every_round_s_steps_are_in_the_ledger(private: Any) -> None:
    for client, spent in private.summary["ledger"]["clients"].items():
        lines = [x for x in private.clients if str(x["client"]) == client]
        [entry] = spent["entries"]
        assert entry["steps"] == sum(x["steps"] for x in lines)
        assert {x["sigma"] for x in lines} == {entry["sigma"]}
        assert {x["q"] for x in lines} == {entry["q"]}
        assert entry["q"] == 4 / lines[0]["examples"]


def test_no_loss_of_a_client_is_written_anywhere(private: Any) -> None:
    for line in private.clients:
        assert not {name for name in line if "loss" in name or "accuracy" in name or "norm" in name}
    assert [x["train_loss"] for x in private.metrics] == [None, None]
    assert "own" not in private.summary
    assert all("accuracy" in x for x in private.metrics)  # on the server's own test rows


def test_two_runs_of_one_seed_have_other_noise(run: Any, private: Any) -> None:
    again = run(*DP, "strategy=ffalora", "privacy.epsilon=6")
    assert again.sha != private.sha
    assert again.summary["epsilon"] == private.summary["epsilon"]


def test_a_test_seed_repeats_the_run_and_is_said_everywhere(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (run(*DP, "strategy=ffalora", "privacy.insecure_test_seed=1") for _ in range(2))
    assert one.sha == two.sha
    assert one.summary["epsilon_valid"] is False
    assert one.summary["ledger"]["valid"] is False
    assert {x["epsilon_valid"] for x in one.metrics} == {False}
    assert {x["epsilon_valid"] for x in one.clients} == {False}
    said = capsys.readouterr().out
    assert "NOT VALID" in said
    assert "(not valid)" in said


def test_a_killed_run_pays_for_the_round_that_is_done_again_and_stops_at_the_budget(
    run: Any, private: Any, tmp_path: Path
) -> None:
    from rich.console import Console

    from fedlora.cli.run_job import run_job
    from fedlora.config.resume import continued

    path = tmp_path / "killed"
    shutil.copytree(private.path, path)
    (path / "checkpoint" / "round-000002.safetensors").unlink()  # killed after the replies of round 2
    (path / "summary.json").unlink()
    before = {p.parent.name: Ledger.load(p.read_text()) for p in path.rglob("ledger.json")}
    run_job(continued(path, []), Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (path / "clients.jsonl").read_text().splitlines()]
    last = [x for x in lines if x["round"] == 2]
    assert {x["status"] for x in last} == {"dropped"}  # two rounds were paid for, and two are the budget
    assert all("privacy budget is spent" in x["reason"] for x in last)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["epsilon"] == private.summary["epsilon"] <= 6
    for client, ledger in before.items():
        assert Ledger.load((path / "checkpoint" / "clients" / client / "ledger.json").read_text()).covers(
            ledger
        )


def test_a_private_run_takes_no_more_rounds_than_its_noise_is_for(private: Any) -> None:
    from fedlora.config.resume import continued

    with pytest.raises(ConfigError, match="noise of this run is for 2 rounds"):
        continued(private.path, ["rounds=3"])


def test_counts_that_are_not_public_are_nowhere(run: Any) -> None:
    hidden = run(*DP, "strategy=fedit", "privacy.public_counts=false", "privacy.epsilon=6")
    for line in hidden.clients:
        assert line["examples"] == 1
        assert not {"q", "sigma", "steps", "loss"} & line.keys()
        assert line["epsilon"] == 6
    assert hidden.summary["ledger"]["clients"] == {}
    assert hidden.summary["epsilon"] == 6


def test_dplora_is_fedit_with_both_factors_noised(run: Any) -> None:
    done = run("strategy=dplora", "privacy.accountant=rdp", "client.batch_size=4", "rounds=1")
    assert done.summary["epsilon"] <= 8
    assert done.summary["strategy"] == "fedit"


@pytest.mark.parametrize("strategy", ["hetlora", "fedsvd", "privatelora", "fedfold", "rolora"])
def test_other_strategies_train_privately_as_they_are(run: Any, strategy: str) -> None:
    done = run(*DP, f"strategy={strategy}", "rounds=2", "ranks=4")
    assert done.summary["epsilon"] <= 8
    assert done.summary["dropped"] == 0


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["strategy=fedsalora"], "leaves clients a part of their own"),
        (["strategy=fedms"], "leaves clients a part of their own"),
        (["strategy=pfedlora"], "leaves clients a part of their own"),
        (["strategy=slora"], "sparse rounds"),
        (["client=sliced"], "SlicedTraining cannot train under differential privacy"),
        (["evaluate.clients=true"], "not covered by epsilon"),
        (["lora.dora=true"], "no gradient for each record"),
        (["client.batch_size=40"], r"client \d: privacy: a client has \d+ records"),
        (["privacy.delta=0.5"], "expected less than 1/"),
        (["privacy.epsilon=-1"], "privacy.epsilon"),
    ],
    ids=str,
)
def test_what_epsilon_would_not_cover_is_refused_before_the_first_round(
    run: Any, overrides: list[str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(*DP, *overrides)


def test_a_key_of_privacy_without_privacy_is_refused(run: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'epsilon'.*dp_sgd"):
        run("privacy.epsilon=8")


def test_metrics_that_may_be_known_come_and_are_said_not_to_be_covered(run: Any) -> None:
    done = run(*DP, "strategy=ffalora", "privacy.epsilon=6", "privacy.public_metrics=true")
    assert all(0 <= line["clipped"] <= 1 and line["loss"] > 0 for line in done.clients)
    assert all(0 <= line["clipped"] <= 1 and line["train_loss"] > 0 for line in done.metrics)
    assert any("public_metrics" in said for said in done.summary["ledger"]["not_covered"])


def test_a_resumed_run_notices_a_ledger_that_is_gone_or_older(private: Any, tmp_path: Path) -> None:
    from rich.console import Console

    from fedlora.cli.run_job import run_job
    from fedlora.config.resume import continued
    from fedlora.errors import CheckpointError

    for name, text in (("gone", None), ("older", Ledger(1e-5).plus(Entry(1.0, 0.1, 1)).dump())):
        path = tmp_path / name
        shutil.copytree(private.path, path)
        (path / "checkpoint" / "round-000002.safetensors").unlink()
        (path / "summary.json").unlink()
        ledger = path / "checkpoint" / "clients" / "client-1" / "ledger.json"
        ledger.unlink() if text is None else ledger.write_text(text)
        with pytest.raises(CheckpointError, match="client 1 has let out"):
            run_job(continued(path, []), Console(file=io.StringIO()))
