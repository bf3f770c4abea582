"""Whole runs under client-level privacy: what they promise, write and refuse."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import Entry, Ledger, epsilon

pytestmark = pytest.mark.slow  # whole runs

CENTRAL = ("privacy=client_level", "privacy.accountant=rdp", "privacy.epsilon=6", "clients=6")


@pytest.fixture(scope="module")
def central(run: Any) -> Any:
    """A run of two rounds of three clients on the average; tests read it and copy it."""
    return run(*CENTRAL, "clients_per_round=3", "strategy=ffalora")


def test_epsilon_is_the_server_s_over_all_rounds(central: Any) -> None:
    ledger, [first, last] = central.summary["ledger"], central.metrics
    [entry] = ledger["server"]["entries"]
    assert (entry["q"], entry["steps"]) == (0.5, 2)
    want = epsilon((Entry(entry["sigma"], 0.5, 2),), ledger["server"]["delta"], "rdp")
    assert 0.9 * 6 < want <= 6
    assert central.summary["epsilon"] == last["epsilon"] == pytest.approx(want)
    assert first["epsilon"] < last["epsilon"]
    assert ledger["unit"] == "client"
    assert "adding or removing one client" in ledger["adjacency"]
    assert ledger["clients"] == {}
    assert {line["sigma"] for line in central.metrics} == {entry["sigma"]}
    assert any("who took part" in said for said in ledger["not_covered"])


def test_nothing_that_only_the_updates_tell_is_in_the_metrics(central: Any) -> None:
    for line in central.metrics:
        assert line["train_loss"] is None
        assert "aggregation_error" not in line
        assert "accuracy" in line  # on the server's own rows


def test_two_runs_of_one_seed_have_other_clients_and_noise(run: Any, central: Any) -> None:
    again = run(*CENTRAL, "clients_per_round=3", "strategy=ffalora")
    assert again.sha != central.sha
    assert again.summary["epsilon"] == central.summary["epsilon"]


def test_a_test_seed_repeats_the_run_and_is_said(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (run(*CENTRAL, "clients_per_round=3", "privacy.insecure_test_seed=1") for _ in range(2))
    assert one.sha == two.sha
    assert one.summary["epsilon_valid"] is False
    assert one.summary["ledger"]["server"]["valid"] is False
    assert "NOT VALID" in capsys.readouterr().out


def test_a_round_that_is_done_again_is_paid_again_and_the_budget_ends_the_run(
    run: Any, central: Any, tmp_path: Path
) -> None:
    from rich.console import Console

    from fedlora.cli.run_job import run_job
    from fedlora.config.resume import continued

    path = tmp_path / "killed"
    shutil.copytree(central.path, path)
    (
        path / "checkpoint" / "round-000002.safetensors"
    ).unlink()  # killed between the release and its checkpoint
    (path / "summary.json").unlink()
    before = Ledger.load((path / "checkpoint" / "ledger.json").read_text())
    screen = io.StringIO()
    run_job(continued(path, []), Console(file=screen, width=300))
    assert Ledger.load((path / "checkpoint" / "ledger.json").read_text()) == before
    assert "the privacy budget is spent" in screen.getvalue()
    summary = json.loads((path / "summary.json").read_text())
    assert summary["epsilon"] == central.summary["epsilon"] <= 6
    (path / "checkpoint" / "ledger.json").unlink()
    (path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="the server has let out 2"):
        run_job(continued(path, []), Console(file=screen))


@pytest.mark.parametrize(
    "strategy", ["fedit", "flexlora", "fedsvd", "rolora", "slora", "privatelora", "flora"]
)
def test_other_strategies_that_need_no_more_than_a_mean(run: Any, strategy: str) -> None:
    done = run(*CENTRAL, f"strategy={strategy}", "ranks=4")
    assert done.summary["epsilon"] <= 6
    assert done.summary["dropped"] == 0
    assert done.summary["adapter_sha256"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["strategy=hetlora"], "needs more of its clients' updates than their mean"),
        (["strategy=fedexlora"], "needs more of its clients' updates than their mean"),
        (["strategy=raflora"], "needs more of its clients' updates than their mean"),
        (["strategy=fedsalora"], "leaves clients a part of their own"),
        (["evaluate.clients=true"], "not covered by epsilon"),
        (["evaluate.updates=true"], "not covered by epsilon"),
        (["min_updates=2"], "every round is released"),
        (["privacy.rounds=1"], "expected at least the run's 2"),
        (["privacy.delta=0.2"], "expected less than 1/6"),
        (["privacy.example_cap=0"], "privacy.example_cap"),
    ],
    ids=str,
)
def test_what_epsilon_would_not_cover_is_refused_before_the_first_round(
    run: Any, overrides: list[str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(*CENTRAL, *overrides)


def test_a_run_takes_no_more_rounds_than_its_noise_is_for(central: Any) -> None:
    from fedlora.config.resume import continued

    with pytest.raises(ConfigError, match="noise of this run is for 2 rounds"):
        continued(central.path, ["rounds=3"])


@pytest.mark.parametrize("strategy", ["ffalora", "fedit"])
def test_secure_sums_give_the_same_release_and_hide_the_updates(run: Any, strategy: str) -> None:
    """The same noise by the test seed and, as all are asked, the same clients; they clip themselves."""
    words = (*CENTRAL, f"strategy={strategy}", "privacy.insecure_test_seed=3", "privacy.clip=0.5")
    plain, secure = run(*words), run(*words, "secure_sum=true")
    for name in ("loss", "delta_norm"):
        for a, b in zip(plain.metrics, secure.metrics, strict=True):
            assert b[name] == pytest.approx(a[name], rel=1e-5)
    assert secure.summary["epsilon"] == plain.summary["epsilon"]
    assert not any("the server itself" in said for said in secure.summary["ledger"]["not_covered"])
    assert any("under masks" in said for said in secure.summary["ledger"]["not_covered"])
    capped = run(*words, "secure_sum=true", "privacy.example_cap=20")
    assert capped.metrics[0]["delta_norm"] != secure.metrics[0]["delta_norm"]


@pytest.mark.parametrize(("step", "came"), [("total", 6), ("__init__", 0)])
def test_a_round_whose_sum_cannot_be_known_releases_nothing_and_costs_nothing(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str, came: int
) -> None:
    """Noise in its place would be a second kind of release, and one client could decide which it is."""
    from fedlora.errors import IncompatibleUpdates
    from fedlora.secure_aggregation.masked_round import SecureSum

    done, whole = [], getattr(SecureSum, step)

    def torn_once(self: SecureSum, *rest: Any, **more: Any) -> Any:
        done.append(step)
        if len(done) == 1:
            raise IncompatibleUpdates("shares are wrong")
        return whole(self, *rest, **more)

    monkeypatch.setattr(SecureSum, step, torn_once)
    found = run(*CENTRAL, "secure_sum=true", "strategy=ffalora")
    first, last = found.metrics
    assert "shares are wrong; the state stays" in capsys.readouterr().out.replace(
        "shares are wrong\nwarning: round 1: there is no sum, since the clients did not agree on masks",
        "shares are wrong",
    )
    assert (first["clients"], last["clients"]) == (came, 6)
    assert (first["epsilon"], "delta_norm" in first) == (0.0, False)
    assert first["loss"] == found.summary["initial"]["loss"] != last["loss"]
    [entry] = found.summary["ledger"]["server"]["entries"]
    assert (entry["q"], entry["steps"]) == (1.0, 1)
    assert found.summary["ledger"]["unit"] == "contribution"
    assert "replacing all updates of one client" in found.summary["ledger"]["adjacency"]


def test_a_run_that_released_nothing_says_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.errors import FedLoraError, IncompatibleUpdates
    from fedlora.secure_aggregation.masked_round import SecureSum

    def torn(self: SecureSum, add: Any = None) -> Any:
        raise IncompatibleUpdates("shares are wrong")

    monkeypatch.setattr(SecureSum, "total", torn)
    with pytest.raises(FedLoraError, match="no round released anything"):
        run(*CENTRAL, "secure_sum=true", "strategy=ffalora")
