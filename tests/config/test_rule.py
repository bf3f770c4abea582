"""The group `rule` of a configuration, and the refusals before anything is loaded."""

from pathlib import Path

import pytest

import fedlora as fl
from fedlora.config.composition import compose
from fedlora.config.instantiate import Trust
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError
from fedlora.runner.compatibility import BEFORE_LOADING, check
from fedlora.training.rules import FedProx

OWN = """
from dataclasses import dataclass
from fedlora.training.rules import LocalRule


@dataclass(frozen=True)
class Own(LocalRule):
    rate: float
"""


def test_a_rule_is_named_on_the_command_line_and_the_client_follows_it() -> None:
    spec = run_spec(compose(["model=tiny", "data=tiny", "rule=fedprox", "rule.mu=0.5"]))
    assert spec.rule == FedProx(0.5)
    assert spec.local_client.rules == (FedProx(0.5),)  # type: ignore[attr-defined]
    plain = run_spec(compose(["model=tiny", "data=tiny"]))
    assert plain.rule is None
    assert plain.local_client == plain.client


def test_a_rule_of_one_s_own_needs_the_word_of_who_starts_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rules.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["~rule.name", "+rule._target_=own_rules.Own", "+rule.rate=0.5"]
    config = compose(["model=tiny", "data=tiny", *words])
    with pytest.raises(ConfigError, match=r"allow=\[own_rules\]"):
        run_spec(config)
    spec = run_spec(Trust(("own_rules",)).into(config))
    assert type(spec.rule).__name__ == "Own"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy=fedms"], "rule: client GatedExperts trains in steps of its own"),
        (["strategy=pfedlora"], "rule: client TwoPhase trains in steps of its own"),
    ],
)
def test_a_client_that_follows_no_rules_is_refused_before_anything_is_loaded(
    words: list[str], message: str
) -> None:
    spec = run_spec(compose(["model=tiny", "data=tiny", "rule=fedprox", *words]))
    with pytest.raises(ConfigError, match=message):
        check(BEFORE_LOADING, spec)


def test_a_number_that_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"FedProx\.mu: expected a number of at least 0, got -1"):
        run_spec(compose(["rule=fedprox", "rule.mu=-1"]))


def test_a_run_from_python_can_be_gone_on_with_by_its_config_where_the_rule_is_packaged(
    tmp_path: Path,
) -> None:
    client = fl.clients.LocalTraining(lr=0.05, rules=[FedProx(0.5)])
    settings = {"clients": 3, "ranks": 2, "rounds": 1, "progress": False}
    fl.simulate("tiny", "tiny", client=client, out=tmp_path / "run", **settings)
    assert fl.open(tmp_path / "run").spec.client.rules == (FedProx(0.5),)
