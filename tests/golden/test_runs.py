"""Kept runs: today's command gives the adapters, bytes and files that were written down. See make_runs.py."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
KEPT = json.loads((HERE / "runs.json").read_text())


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make_runs", HERE / "make_runs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KEPT["runs"]))
def test_a_kept_run_comes_out_as_before(golden: ModuleType, name: str, tmp_path: Path) -> None:
    made = json.loads(json.dumps(golden.run(name, tmp_path)))
    assert golden.differences(KEPT["runs"][name], made, bits=KEPT["processor"] == golden.processor()) == []


def test_every_run_is_kept(golden: ModuleType) -> None:
    assert {name: run["overrides"] for name, run in KEPT["runs"].items()} == golden.RUNS
