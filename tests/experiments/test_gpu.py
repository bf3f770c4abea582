"""The benchmark of a GPU: what it claims holds on a CPU, and a section that fails harms no other."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.experiments.benchmarks.gpu.bench import Bench
from fedlora.experiments.benchmarks.gpu.parity import gap
from fedlora.experiments.benchmarks.gpu.peft_loop import PeftLoop, Work
from fedlora.experiments.benchmarks.gpu.report import Report
from fedlora.experiments.benchmarks.gpu.rows import Batches, Lengths, chats, questions, round_of
from fedlora.experiments.benchmarks.gpu.sections import run
from fedlora.experiments.benchmarks.gpu.shapes import TINY, llama_base, start
from fedlora.seeds import generator

ROOT = Path(__file__).parents[2]
SECTIONS = ["parity", "speed-1b", "memory", "step", "private"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--tiny", "--minutes", "10"]
    subprocess.run(
        [*command, "--out", str(out), "--section", *SECTIONS], cwd=ROOT, check=True, capture_output=True
    )
    return out


@pytest.fixture
def sections(found: Path) -> dict[str, dict[str, object]]:
    results = json.loads((found / "gpu.json").read_text(encoding="utf-8"))["sections"]
    return results


@pytest.mark.slow
def test_parity_holds_for_four_architectures(sections: dict[str, dict]) -> None:
    (rows,) = sections["parity"]["tables"].values()
    assert [row["model"] for row in rows] == ["BERT encoder", "Llama, grouped queries", "Qwen3", "GPT-2"]
    for row in rows:
        assert row["fed as"].startswith("packed rows, ")
        assert "attention" in row["fed as"]
        assert row["device to CPU"] <= 1e-4
        assert 0 < row["CPU to float64"] <= 1e-4  # there is rounding, and it is seen
        assert row["fused to alone"] <= 1e-4
        assert 1e-4 < row["bf16: fused to float32"] <= 1.25 * row["bf16: alone to float32"]
        assert row["PEFT's logits"] <= 1e-4
        assert row["same hash"]
        assert row["bf16: same hash"]
    goals = sections["parity"]["goals"]
    assert len(goals) == 5
    assert all(goal["goal"] == 4 and goal["met"] is True for goal in goals)


@pytest.mark.slow
def test_both_systems_do_the_same_work(sections: dict[str, dict]) -> None:
    (rows,) = sections["speed-1b"]["tables"].values()
    assert [row["a step"] for row in rows] == ["4 x 64", "4 chats", "32 chats"]
    assert all(row["losses differ by"] < 1e-5 and row["same hash"] for row in rows)
    for row in rows:
        assert row["tokens"] == pytest.approx(row["clients"] * row["steps"] * row["tokens a step"], rel=0.02)
        assert row["seconds"].keys() == {"loop", "fedlora"}


@pytest.mark.slow
def test_speed_and_memory_are_not_judged_without_a_gpu(sections: dict[str, dict]) -> None:
    goals = {name: [goal["met"] for goal in one["goals"]] for name, one in sections.items()}
    judged = {name: met for name, met in goals.items() if any(one is not None for one in met)}
    assert judged.keys() == {"parity"}
    assert all(goals[name] for name in ("speed-1b", "memory", "step", "private"))


@pytest.mark.slow
def test_every_section_ends_well_and_what_is_printed_is_kept(found: Path, sections: dict[str, dict]) -> None:
    assert {name: one["error"] for name, one in sections.items()} == dict.fromkeys(["card", *SECTIONS])
    printed = (found / "gpu.txt").read_text(encoding="utf-8")
    for one in sections.values():
        assert all(title in printed for title in one["tables"])
        assert all(goal["what"] in printed for goal in one["goals"])
    operations = next(rows for title, rows in sections["step"]["tables"].items() if "operations" in title)
    assert len(operations) == 25
    assert any(row["operation"] == "aten::mm" for row in operations)


@pytest.mark.slow
@pytest.mark.parametrize("room", [None, 150])
def test_the_loop_and_fedlora_end_in_the_same_adapters(room: int | None) -> None:
    base = llama_base(TINY["1B"], "cpu", torch.float32)
    adapter = start(base, 4)
    client = LocalTraining(lr=1e-2, batch_size=32, steps=3)
    requests = round_of(base, [adapter] * 2, Batches("", 32, questions), 3)
    loop = PeftLoop(base.model, adapter, rate=1e-2)
    loop.room = room  # None takes a step in one pass for each length of rows
    ended, _ = loop.round([Work(adapter, client.batches(request)) for request in requests])
    for result, factors in zip(client.train(base, requests), ended, strict=True):
        wanted = dict(result.adapter.tensors())
        assert factors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert float((factors[name] - tensor).norm()) <= 1e-3 * float(tensor.norm())


@pytest.mark.parametrize(
    ("lengths", "median", "mean", "most"), [(questions, 9, 10, 37), (chats, 180, 250, 1024)]
)
def test_rows_are_as_long_as_real_ones(lengths: Lengths, median: float, mean: float, most: int) -> None:
    found = lengths(generator(0, "lengths"), 20000)
    assert np.median(found) == pytest.approx(median, rel=0.05)
    assert found.mean() == pytest.approx(mean, rel=0.05)
    assert found.max() == most


def test_a_result_that_is_no_number_is_seen_as_a_difference() -> None:
    def adapter(value: float) -> Adapter:
        return Adapter({"q": Pair(torch.tensor([[value, 1.0]]), torch.ones(3, 1))}, {"z": torch.ones(1)})

    assert gap([adapter(2.2)], [adapter(2.0)], [adapter(1.0)]) == pytest.approx(0.2, rel=1e-5)
    assert math.isnan(gap([adapter(math.nan)], [adapter(2.0)], [adapter(1.0)]))


def test_a_section_that_fails_or_overruns_harms_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.experiments.benchmarks.gpu.sections.GRACE", 0.0)

    def fails(bench: Bench) -> None:
        bench.report.table("begun", ["a"]).row(1)
        raise ValueError("no such kernel\nsecond line")

    def overruns(bench: Bench) -> None:
        time.sleep(60)

    def works(bench: Bench) -> None:
        bench.report.goal(1, "it fits", True)

    report = Report(tmp_path, {"device": "cpu"})
    now = time.monotonic()
    every = {"fails": (fails, 1.0), "overruns": (overruns, 1.0), "works": (works, 1.0)}
    run(Bench("cpu", True, report), every, now, now + 4)
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"]
    assert "in fails\n    raise ValueError" in results["fails"]["error"]
    assert results["fails"]["tables"] == {"begun": [{"a": 1}]}
    assert "TimeUp" in results["overruns"]["error"]
    assert results["works"]["error"] is None
    assert results["works"]["goals"] == [{"goal": 1, "what": "it fits", "met": True}]
    lines = (tmp_path / "gpu.txt").read_text(encoding="utf-8").splitlines()
    assert "fails ended early: ValueError: no such kernel" in lines
    assert "goal 1: it fits: met" in lines


def test_what_is_left_out_for_want_of_time_says_so(tmp_path: Path) -> None:
    report, now = Report(tmp_path, {}), time.monotonic()
    run(Bench("cpu", True, report), {"late": (lambda bench: None, 1.0)}, now - 2, now - 1)
    assert report.sections[0].notes == ["late: left out, the time is up"]
