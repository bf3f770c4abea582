"""The list `steps` of a configuration, what is refused before anything is loaded, and the way from Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora.config.composition import compose
from fedlora.config.instantiate import Trust
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError
from fedlora.robust import Clip
from fedlora.runner.compatibility import BEFORE_LOADING, check

pytestmark = pytest.mark.slow  # whole runs

OWN = """
from dataclasses import dataclass

from fedlora import ClientUpdate, UpdateStep


@dataclass(frozen=True)
class Half(UpdateStep):
    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        return given.moved({name: by / 2 for name, by in given.change.items()})
"""
CLIP = "{_target_: fedlora.robust.Clip, bound: 0.5}"
BASE = ("model=tiny", "data=tiny")
SMALL: dict[str, Any] = {"clients": 3, "rounds": 1, "ranks": 4, "progress": False}


@dataclass(frozen=True)
class Client(fl.UpdateStep):
    def on_client(self, given: fl.ClientUpdate) -> fl.ClientUpdate:
        return given


@dataclass(frozen=True)
class Server(fl.UpdateStep):
    def on_server(self, given: fl.RoundUpdates) -> fl.RoundUpdates:
        return given


@dataclass(frozen=True)
class Both(Client, Server):
    pass


@dataclass(frozen=True)
class Neither(fl.UpdateStep):
    pass


@dataclass(frozen=True)
class Rule(fl.robust.Krum):
    def on_client(self, given: fl.ClientUpdate) -> fl.ClientUpdate:
        return given


def test_steps_are_listed_on_the_command_line_in_their_order() -> None:
    assert run_spec(compose(BASE)).steps == ()
    spec = run_spec(compose([*BASE, f"steps=[{CLIP},{CLIP.replace('0.5', '2')}]"]))
    assert spec.steps == (Clip(0.5), Clip(2))


def test_a_configuration_of_before_there_were_steps_has_none() -> None:
    config = compose(BASE)
    old = type(config)({name: config[name] for name in config if name != "steps"})
    assert run_spec(old).steps == ()


def test_a_step_of_one_s_own_needs_the_word_of_who_starts_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_halves.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose([*BASE, "steps=[{_target_: own_halves.Half}]"])
    with pytest.raises(ConfigError, match=r"steps\.0: 'own_halves\.Half' .* allow=\[own_halves\]"):
        run_spec(config)
    (step,) = run_spec(Trust(("own_halves",)).into(config)).steps
    assert type(step).__name__ == "Half"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{_target_: fedlora.robust.Clip, bound: 0}]", r"Clip\.bound: expected a number above 0, got 0"),
        ("[{_target_: fedlora.robust.Clip}]", r"steps\.0: .*bound"),
        ("[{_target_: torch.nn.Identity}]", r"steps\.0: expected a _target_ that makes a UpdateStep"),
        ("[{bound: 1}]", r"steps\.0: expected a _target_ that makes a UpdateStep, got a dict"),
        ("[clip]", r"steps: expected a list such as \[{_target_: my_steps\.Mine}\], got \['clip'\]"),
        (f"[{CLIP[:-1]}, _partial_: true}}]", r"steps\.0\._partial_: this word of Hydra's"),
    ],
)
def test_what_is_no_step_is_refused_in_one_line(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_spec(compose([*BASE, f"steps={given}"]))


@pytest.mark.parametrize("given", ["clip", 5, {"_target_": "fedlora.robust.Clip"}])
def test_a_server_s_configuration_is_read_as_carefully(given: Any) -> None:
    config = compose(BASE)
    sent = type(config)({**config, "steps": given})
    with pytest.raises(ConfigError, match="steps: expected a list"):
        run_spec(sent)


HIDDEN = ("secure_sum=true", "privacy=client_level")


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(
    ("steps", "named"),
    [([Server()], "Server"), ([Client(), Both()], "Both"), ([Client()], ""), ([Clip(1)], "")],
)
def test_a_sum_allows_client_halves_alone(hidden: str, steps: Sequence[Any], named: str) -> None:
    spec = run_spec(compose([*BASE, "strategy=ffalora", hidden]), {"steps": steps})
    if not named:
        check(BEFORE_LOADING, spec)
        return
    with pytest.raises(
        ConfigError, match=f"steps: under {hidden.removesuffix('=true')}.* for {named} to work"
    ):
        check(BEFORE_LOADING, spec)


def test_a_code_for_an_update_is_not_evaluated() -> None:
    config = compose([*BASE, "evaluate.updates=true"])
    check(BEFORE_LOADING, run_spec(config, {"steps": [Client(), Server()]}))
    with pytest.raises(ConfigError, match=r"evaluate\.updates: what a client sends is Both's code"):
        check(BEFORE_LOADING, run_spec(config, {"steps": [Client(), Both()]}))


def test_a_step_has_a_half() -> None:
    with pytest.raises(ConfigError, match=r"steps\[1\]: Neither has no half; write its on_client"):
        fl.simulate("tiny", "tiny", steps=[Client(), Neither()], **SMALL)


def test_a_robust_rule_works_at_the_server_alone() -> None:
    with pytest.raises(ConfigError, match=r"robust: .* Rule has an on_client, .* steps=\[\.\.\.\]"):
        fl.simulate("tiny", "tiny", robust=Rule(), **SMALL)


def test_python_and_the_command_line_make_one_run_and_its_folder_names_the_step(tmp_path: Path) -> None:
    from fedlora.cli.main import main

    words = ["clients=3", "rounds=1", "ranks=4", f"steps=[{CLIP}]", f"out={tmp_path / 'cli'}"]
    main(["run", *BASE, *words])
    said = fl.open(tmp_path / "cli").summary["adapter_sha256"]
    run = fl.simulate("tiny", "tiny", steps=[Clip(0.5)], out=tmp_path / "python", **SMALL)
    assert run.summary["adapter_sha256"] == said
    assert fl.simulate("tiny", "tiny", **SMALL).summary["adapter_sha256"] != said
    assert "from_python" not in run.config
    assert fl.open(tmp_path / "python").spec.steps == (Clip(0.5),)


def test_a_step_that_no_configuration_can_name_is_given_again(tmp_path: Path) -> None:
    run = fl.simulate("tiny", "tiny", steps=[Clip(0.5), Client()], out=tmp_path / "run", **SMALL)
    assert run.config["from_python"] == ["steps"]
    with pytest.raises(ConfigError, match=r"steps=\.\.\."):
        fl.open(tmp_path / "run").resume(rounds=2)
    assert len(fl.open(tmp_path / "run").resume(rounds=2, steps=[Clip(0.5), Client()]).metrics) == 2
