"""What a `_target_` may be of what a group may name: a class of the group's kind, and no plain function."""

from contextlib import suppress
from functools import reduce
from importlib import import_module
from inspect import isfunction
from pkgutil import walk_packages
from typing import Any

import pytest
from omegaconf import OmegaConf

import fedlora
from fedlora.config.allowed import OURS
from fedlora.config.instantiate import make, named
from fedlora.core.strategy import Strategy
from fedlora.errors import ConfigError
from fedlora.privacy import ClientLevel, Privacy
from fedlora.training.client import Client

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STRATEGY = "fedlora.strategies.FedIT"


def test_what_is_made_must_be_of_the_groups_kind() -> None:
    wrong = {"strategy": {"_target_": "torch.nn.Identity"}, "client": {"_target_": STRATEGY}}
    with pytest.raises(ConfigError, match="expected a _target_ that makes a Strategy, got a Identity"):
        make(OmegaConf.create(wrong), "strategy", Strategy)
    with pytest.raises(ConfigError, match="outside of what"):
        make(OmegaConf.create(wrong), "client", Client)
    for odd in ("dp_sgd", ["x"], 1):
        with pytest.raises(ConfigError, match="privacy: expected keys and values"):
            named(OmegaConf.create({"privacy": odd}), "privacy", Privacy)


def test_the_wrong_kind_is_not_even_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.privacy.DPSGD.__post_init__", lambda self: pytest.fail("it was made"))
    with pytest.raises(ConfigError, match="expected a _target_ that makes a ClientLevel, got a DPSGD"):
        make(OmegaConf.create({"privacy": {"_target_": "fedlora.privacy.DPSGD"}}), "privacy", ClientLevel)


def functions(package: str) -> list[str]:
    """The dotted names of the public functions of a package, or of a module."""
    found = import_module(package)
    names = [package, *(m.name for m in walk_packages(getattr(found, "__path__", []), f"{package}."))]
    return [
        f"{module}.{name}"
        for module in names
        for name, thing in vars(import_module(module)).items()
        if isfunction(thing) and thing.__module__.startswith(package) and resolves(f"{module}.{name}", thing)
    ]


def resolves(target: str, thing: Any) -> bool:
    """Whether a name is this thing's: a function may stand before the module that it is named like."""
    with suppress(AttributeError):
        return reduce(getattr, target.split(".")[1:], fedlora) is thing
    return False


@pytest.mark.parametrize("group", sorted({*OURS} - {"data", "model"}))
def test_a_plain_function_of_ours_is_called_for_rows_and_models_alone(group: str) -> None:
    for name in (name for package in OURS[group] for name in functions(package)):
        for part in ({"_target_": name}, {"x": [{"_target_": name}]}):
            assert f"'{name}' is outside" in refusal(group, part)
    assert "fedlora.engines.simulation_grid.answer" in functions("fedlora.engines")


def refusal(group: str, part: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(OmegaConf.create({group: part}), group)
    return str(caught.value)
