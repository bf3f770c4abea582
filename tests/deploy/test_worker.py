"""What a site's own words allow, and the worker that answers for it, without a network."""

import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from site_lab import rows

from fedlora.deploy import flower_app
from fedlora.deploy.site import rank_of
from fedlora.deploy.site_config import Invitation, SiteConfig, check_name
from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs


def test_a_site_says_who_it_is(ask: Any, composed: Any, site: dict[str, Any]) -> None:
    reply = ask(composed(), site | {"rank": 3})()
    found = dict(reply.content["profile"])
    assert (found["client"], found["rank"], found["rows"]) == (0, 3, 24)
    assert abs(found["clock"] - time.time()) < 60
    assert found["free_mb"] > 0


def test_a_site_without_a_rank_takes_the_runs(composed: Any, site: dict[str, Any]) -> None:
    for client, rank in ((0, 2), (1, 4), (2, 2)):
        assert rank_of(composed(), SiteConfig.read(site | {"client": client})) == rank


def test_what_is_wrong_with_its_rows_stays_at_the_site(
    ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = rows(tmp_path / "odd.jsonl", extra="secret-label")
    why = ask(composed(), site | {"data": str(own)}).why()
    assert "DataError" in why
    assert "worker.log" in why
    assert "secret-label" not in why
    assert "secret-label" in caplog.text


def test_a_site_that_has_forgotten_a_run_says_so(ask: Any, composed: Any, site: dict[str, Any]) -> None:
    content = RecordDict({"config": ConfigRecord({"round": 1, "seed": 0, "task": "", "grown": ""})})
    assert "has never met 'trial'" in ask(composed(), site)("train", content).error.reason


def test_its_own_names_of_columns_count(
    ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path
) -> None:
    own = str(rows(tmp_path / "other.jsonl", label="thema"))
    why = ask(composed(), site | {"data": own}).why()
    assert 'has no column "label", which label in node.toml' in why and "/state/worker.log" in why  # noqa: PT018
    assert not ask(composed(), site | {"data": own, "label": "thema"})().has_error()


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "more rounds than agreed": ({"max-rounds": 4}, (), "at most 4 rounds"),
    "updates in the clear": ({"secure": True}, (), "secure_sum=true"),
    "a larger delta than a run takes by itself": (
        {"epsilon": 8.0},
        ("privacy=dp_sgd", "privacy.delta=1.1e-5"),
        "a delta of at most min(1e-5, 0.1 / rows)",
    ),
    "a larger delta than its own": (
        {"epsilon": 8.0, "delta": 1e-6},
        ("privacy=dp_sgd", "privacy.delta=2e-6"),
        "a delta of at most 1e-06 (delta), the run asks 2e-06",
    ),
    "rows that may be longer than the model has room for": ({}, ("data.max_length=129",), "128 tokens"),
    "privacy off": ({"epsilon": 8.0}, (), "private runs alone"),
    "client-level privacy": ({"epsilon": 8.0}, ("privacy=client_level",), "private runs alone"),
    "noise that others know": (
        {"epsilon": 8.0},
        ("privacy=dp_sgd", "privacy.insecure_test_seed=1"),
        "privacy.insecure_test_seed",
    ),
    "losses without noise": (
        {"epsilon": 8.0},
        ("privacy=dp_sgd", "privacy.public_metrics=true"),
        "privacy.public_metrics",
    ),
    "more epsilon than its budget": ({"epsilon": 2.0}, ("privacy=dp_sgd", "privacy.epsilon=3"), "2 at most"),
    "another data set": ({}, ("data=tiny",), "its own file alone"),
    "another file": ({}, ("data.file=secret.jsonl",), "which is not 'secret.jsonl'"),
    "a file outside its folder": ({"data": "FOLDER"}, ("data.file=../state/x.jsonl",), "leads out"),
    "a file by its whole path": ({"data": "FOLDER"}, ("data.file=/etc/passwd",), "leads out"),
    "no file of a folder": ({"data": "FOLDER"}, (), "data.file=NAME"),
    "code of others": ({}, ("client._target_=os.system",), "allow"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_site_refuses(what: str, ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path) -> None:
    own, overrides, said = REFUSED[what]
    words = {key: str(tmp_path / "own") if value == "FOLDER" else value for key, value in own.items()}
    assert said in ask(composed(*overrides), site | words).why()


def test_a_file_of_a_sites_folder_is_taken(
    ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path
) -> None:
    rows(tmp_path / "own" / "deep" / "er.jsonl", 30)
    words = site | {"data": str(tmp_path / "own")}
    assert ask(composed("data.file=deep/er.jsonl"), words)().content["profile"]["rows"] == 30


def test_a_link_out_of_the_folder_is_no_way_out(
    ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path
) -> None:
    rows(tmp_path / "private.jsonl")
    (tmp_path / "own" / "link.jsonl").symlink_to(tmp_path / "private.jsonl")
    words = site | {"data": str(tmp_path / "own")}
    assert "leads out" in ask(composed("data.file=link.jsonl"), words).why()


def test_a_budget_is_that_of_all_runs_together(
    ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path
) -> None:
    words = site | {"epsilon": 5.0, "data": str(rows(tmp_path / "many.jsonl", 200))}

    def asks(experiment: str, epsilon: float) -> Message:
        config = composed("privacy=dp_sgd", f"privacy.epsilon={epsilon}")
        config.engine.experiment = experiment
        asked = ask(config, words, experiment=experiment)
        reply = asked()
        if not reply.has_error():  # a check alone promises nothing
            asked("train", RecordDict({"config": ConfigRecord({"round": 99, "seed": 0})}))
        return reply

    assert not asks("one", 3.0).has_error()
    assert not asks("one", 3.0).has_error()  # the same run again, after a restart
    assert "3 are promised to others" in asks("two", 2.5).error.reason
    assert not asks("two", 2.0).has_error()
    assert asks("three", 0.1).has_error()


def test_a_check_promises_nothing(ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path) -> None:
    words = site | {"epsilon": 5.0, "data": str(rows(tmp_path / "many.jsonl", 200))}
    for experiment in ("check", "other"):
        config = composed("privacy=dp_sgd", "privacy.epsilon=4")
        config.engine.experiment = experiment
        assert not ask(config, words, experiment=experiment)().has_error()


def test_a_plan_of_another_run_is_refused(ask: Any, composed: Any, site: dict[str, Any]) -> None:
    assert "the plan is of 'other'" in ask(composed(), site, experiment="other").why()


def test_a_lie_about_rounds_ends_with_them(ask: Any, composed: Any, site: dict[str, Any]) -> None:
    asked = ask(composed("rounds=2"), site | {"max-rounds": 2})
    assert not asked().has_error()
    content = RecordDict({"config": ConfigRecord({"round": 4, "seed": 0, "task": "", "grown": ""})})
    assert "round 4 of 2" in asked("train", content).error.reason


def test_a_site_knows_how_many_rounds_there_are_and_so_the_rate_of_each(
    ask: Any, composed: Any, site: dict[str, Any]
) -> None:
    asked = ask(composed("rounds=8", "client.lr=1", "client.over_rounds.schedule=linear"), site)
    assert not asked().has_error()
    assert asked.train(3).content["metrics"]["lr"] == 0.75


def test_rows_and_settings_are_looked_at_without_the_model(
    ask: Any, composed: Any, site: dict[str, Any]
) -> None:
    nowhere = site | {"model": "/no/model"}
    found = ask(composed(), nowhere, model="")().content.config_records["profile"]
    assert (found["client"], found["rank"], found["rows"]) == (0, 2, 24)
    assert "'text'" not in ask(composed(), nowhere | {"text": "note"}, model="").why()
    assert '"note"' in ask(composed(), nowhere | {"text": "note"}, model="").why()
    # No model is a wrong model to train.
    asked = ask(composed(), site, model="")
    assert not asked().has_error()
    assert "another than the server's" in asked.why(asked.train())


def test_another_model_is_noticed_before_anything_is_trained(
    ask: Any, composed: Any, site: dict[str, Any]
) -> None:
    assert "fingerprint" in ask(composed(), site, model="0" * 64).why()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 3 + "\0", "a\nb"])
def test_an_experiments_name_leads_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.experiment"):
        check_name(name)
    with pytest.raises(ConfigError):
        Invitation.read(Invitation(name, "instruction", (), "x").record())


@pytest.mark.parametrize(
    "words",
    [
        {"epsilom": 8.0},
        {"max-round": 3},
        {"client": -1},
        {"client": "0"},
        {"client": True},
        {"rank": 0},
        {"max-rounds": 0},
        {"max-rounds": 1, "max_rounds": 9},
        {"epsilon": 0},
        {"epsilon": True},
        {"epsilon": 8.0, "delta": 0},
        {"epsilon": 8.0, "delta": 1.0},
        {"epsilon": 8.0, "delta": "1e-5"},
        {"delta": 1e-5},
        {"secure": 1},
        {"secure": "true"},
        {"warm": 0},
    ],
)
def test_a_word_that_cannot_be_switches_no_limit_off(words: dict[str, Any], site: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--node-config"):
        SiteConfig.read(site | words)


def test_every_word_of_a_site_is_in_the_file_that_it_is_given(local_deployment: Path) -> None:
    text = (next((local_deployment / "sites").iterdir()) / "node.toml").read_text()
    lines = [line.removeprefix("# ") for line in text.splitlines() if re.match(r"(# )?[a-z-]+ = ", line)]
    said = tomllib.loads("\n".join(lines))
    assert {key.replace("-", "_") for key in said} == {field.name for field in fields(SiteConfig)}
    SiteConfig.read(said)  # and each may be said as it stands there


def test_what_must_be_said_is_asked_for(site: dict[str, Any]) -> None:
    for key in ("client", "data", "state"):
        with pytest.raises(ConfigError, match=f"{key}=..."):
            SiteConfig.read({k: v for k, v in site.items() if k != key})


def test_one_warm_worker_answers_over_its_socket_and_ends_with_its_parent(
    ask: Any, composed: Any, site: dict[str, Any]
) -> None:
    home = Path(site["state"])
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    asked = ask(composed(), site)
    message = Message(RecordDict({"plan": ConfigRecord(dict(asked.plan.record()))}), 11, "query.profile")
    message.metadata.__dict__["_message_id"] = "m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getppid", lambda: parent.pid)
        replies = [flower_app.Relay()(message, asked.context) for _ in range(2)]
    assert [reply.content["profile"]["rows"] for reply in replies] == [24, 24]
    log = (home / "worker.log").read_text()
    assert log.count("listening") == 1
    assert (home / "worker").stat().st_mode & 0o777 == 0o700
    assert (home / "worker" / "secret").stat().st_mode & 0o777 == 0o600
    # whoever lacks the secret gets nothing
    (home / "worker" / "secret").write_bytes(b"x" * 32)
    with pytest.raises(ConnectionError):
        flower_app.ask(home, message, asked.context)
    parent.kill()
    parent.wait()
    assert len(flower_app._started) == 1
    until = time.monotonic() + 20
    while (home / "worker" / "socket").exists() and time.monotonic() < until:
        time.sleep(0.1)
    flower_app._started.pop().wait(10)
    assert "is gone" in (home / "worker.log").read_text()
