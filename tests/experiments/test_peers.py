"""The benchmark against peers gives everyone the same job."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_bare_loop_and_fedlora_end_in_the_same_adapter(tmp_path: Path) -> None:
    size = ["--clients", "2", "--rows", "9", "--batch", "4", "--rounds", "2", "--repeats", "1"]
    command = [sys.executable, "-m", "experiments.benchmarks.peers", *size, "--threads", "1"]
    systems = ["--systems", "bare", "fedlora fused"]
    subprocess.run([*command, *systems, "--to", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))["found"]
    assert found["bare"]["apart"] == 0
    assert max(one["apart"] for one in found.values()) < 5e-3
    assert all(0 < one["first"] < one["whole"] and one["peak"] > 100 for one in found.values())
