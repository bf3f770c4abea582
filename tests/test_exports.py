"""The public interface is a list: sorted, complete, documented, and quick to import."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora.clients
import fedlora.strategies
from fedlora import Strategy

ROOT = Path(__file__).parents[1]
PACKAGES = ["fedlora", "fedlora.strategies", "fedlora.clients"]
EXPORTS = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]
SLOW = {"transformers", "peft", "flwr", "matplotlib", "hydra"}  # for the commands that need them


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_not_empty(package: str) -> None:
    exported = importlib.import_module(package).__all__
    assert exported
    assert list(exported) == sorted(set(exported))


@pytest.mark.parametrize(("package", "name"), EXPORTS)
def test_every_export_exists_and_is_documented(package: str, name: str) -> None:
    thing = getattr(importlib.import_module(package), name)
    doc = inspect.cleandoc(thing.__doc__ or "")
    assert doc, f"{package}.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{package}.{name} has only the docstring that dataclass makes"


@pytest.mark.parametrize("name", fedlora.strategies.__all__)
def test_a_strategy_is_a_frozen_dataclass_of_hyper_parameters(name: str) -> None:
    strategy = getattr(fedlora.strategies, name)
    assert issubclass(strategy, Strategy)
    assert "__dataclass_params__" in vars(strategy), f"{name} is no dataclass itself"
    assert dataclasses.is_dataclass(strategy)
    assert strategy.__dataclass_params__.frozen, f"{name} is not frozen"
    assert strategy.__bases__ == (Strategy,), f"{name} inherits from more than the interface"


@pytest.mark.parametrize("name", fedlora.strategies.__all__)
def test_a_strategy_file_cites_its_paper(name: str) -> None:
    module = importlib.import_module(getattr(fedlora.strategies, name).__module__)
    doc = module.__doc__ or ""
    assert re.search(r"https?://|arXiv:?\s*\d{4}\.\d", doc), f"{module.__name__} cites nothing"
    differs = "Differs from the paper:" in doc or "Our own method." in doc
    assert differs, f"{module.__name__} does not say how it differs"


def test_every_strategy_file_is_exported() -> None:
    files = {path.stem for path in (ROOT / "strategies").glob("*.py") if not path.stem.startswith("_")}
    exported = {getattr(fedlora.strategies, name).__module__ for name in fedlora.strategies.__all__}
    assert exported == {f"fedlora.strategies.{stem}" for stem in files}


def test_import_fedlora_is_light() -> None:
    code = "import sys, fedlora; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    shown = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert "fedlora" in shown.stdout.split()
    assert not SLOW & set(shown.stdout.split())
