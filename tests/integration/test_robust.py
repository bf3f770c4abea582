"""Whole runs with malicious clients under every robust rule, and what is refused before round 1."""

import re
from typing import Any

import pytest

from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs

SIX = (
    "clients=6",
    "ranks=[2,4]",
    "client=poisoned",
    "client.share=0.2",
    "client.kind=sign",
    "client.boost=20",
)
RULES = ["norm", "median", "trimmed", "krum"]


@pytest.fixture(scope="module")
def plain(run: Any) -> Any:
    """The same runs without a rule."""
    return {name: run(*SIX, f"strategy={name}") for name in ("flexlora", "ffalora")}


@pytest.fixture(scope="module")
def evil() -> int:
    """The malicious client of six, at seed 0."""
    from fedlora.clients import LocalTraining, PoisonedTraining

    (one,) = PoisonedTraining(LocalTraining(lr=1.0), "sign", 0.2, 6).malicious(0)
    return one


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strategy", ["flexlora", "ffalora"])
def test_a_rule_keeps_an_attack_out_and_says_who_it_was(
    run: Any, plain: Any, evil: int, rule: str, strategy: str
) -> None:
    made = run(*SIX, f"strategy={strategy}", f"robust={rule}", "rounds=1")
    found, lines = made.metrics[0], {line["client"]: line for line in made.clients}
    assert {line["status"] for line in lines.values()} == {"ok"}
    assert found["delta_norm"] < 0.6 * plain[strategy].metrics[0]["delta_norm"]
    assert found["aggregation_error"] < 1e-5
    if rule == "krum":
        assert "Krum: score" in lines[evil]["rejected"]
        assert found["rejected"] == sum("rejected" in line for line in lines.values()) == 3
    elif rule == "norm":
        assert lines[evil]["kept"] == min(line.get("kept", 1.0) for line in lines.values()) < 0.3
        assert found["bounded"] >= 1
        assert lines[evil]["change"] > found["bound"]
    else:
        assert lines[evil]["distance"] == max(line["distance"] for line in lines.values())
        assert found["unprotected"] == 0  # of six clients three have rank 4
    assert made.sha


def test_none_is_what_was(run: Any, plain: Any) -> None:
    assert run(*SIX, "strategy=flexlora", "robust=none").sha == plain["flexlora"].sha
    assert not {"rejected", "bounded", "unprotected"} & plain["flexlora"].metrics[0].keys()


def test_a_round_with_too_few_replies_changes_nothing(run: Any, monkeypatch: Any, capsys: Any) -> None:
    """Krum of one bad client needs five; a client that fails leaves four."""
    from fedlora.clients.local import LocalTraining

    honest = LocalTraining.train

    def train(self: Any, base: Any, assignments: Any) -> Any:
        if any(a.client == 2 for a in assignments):
            raise RuntimeError("no luck")
        return honest(self, base, assignments)

    monkeypatch.setattr(LocalTraining, "train", train)
    made = run("clients=5", "robust=krum", "engine.fuse=1", "rounds=1")
    assert "4 good updates, 5 needed; the state stays as it was" in capsys.readouterr().out
    assert "delta_norm" not in made.metrics[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["robust=krum"], "Krum needs at least 5 clients a round, got 3"),
        (["robust=krum", "clients=6", "robust.malicious=2"], "needs at least 7 clients a round, got 6"),
        (["robust=norm", "clients_per_round=2"], "needs at least 3 clients a round, got 2"),
        (["robust=median", "secure_sum=true"], "robust: under secure_sum"),
        (
            ["robust=norm", "privacy=client_level", "clients=6", "privacy.accountant=rdp"],
            "robust: under privacy=client_level",
        ),
        (["robust=trimmed", "strategy=hetlora"], "use federa, fedit"),
        (["robust=median", "strategy=fedsalora"], "keep a part of their models"),
        (["robust=trimmed", "robust.share=0.7"], "robust.share: expected a number above 0 and below 0.5"),
        (["robust=median", "robust.share=0.2"], "unknown key 'share'"),
        (["client=poisoned", "clients=null"], "client.clients: expected how many there are"),
    ],
)
def test_what_cannot_be_is_refused_before_round_1(run: Any, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
