"""Comparisons of strategies: the statistics against scipy's own and by hand, and one of real runs."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from fedlora.errors import ConfigError
from fedlora.report.read import Run
from fedlora.report.statistics import Comparison, Score, at_bytes, lines_of, sent

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


def made(values: list[float], sizes: list[int], metric: str = "accuracy", initial: float = 0.1) -> Run:
    """A run that measured these after its rounds, each of which sent so many bytes."""
    metrics = [
        {"round": i, metric: value, "bytes_down": size // 2, "bytes_up": size - size // 2}
        for i, (value, size) in enumerate(zip(values, sizes, strict=True), 1)
    ]
    summary = {"metric": metric, "initial": {metric: initial}, "wall_seconds": 2.0}
    return Run(Path(), summary, metrics, [], {})


WHAT = Comparison(("fedit", "flexlora"), "fedit", (1.0,), SEEDS, 8)
BASE = [made([0.3, 0.5 + 0.01 * s], [100, 100]) for s in SEEDS]
OTHER = [made([0.2, 0.4, 0.6 + 0.03 * s], [40, 120, 300]) for s in SEEDS]
CHOSEN = {"fedit": (1.0, 2, 7.5), "flexlora": (2.0, 2, 9.0)}


def test_the_mean_has_students_interval() -> None:
    values = [0.5, 0.7, 0.6, 0.9]
    found = Score.of(values)
    low, high = stats.t.interval(0.95, 3, sum(values) / 4, stats.sem(values))
    assert (found.mean - (found.half or 0), found.mean + (found.half or 0)) == pytest.approx((low, high))
    assert Score.of([0.5]).half is None
    assert "±" not in str(Score.of([0.5]))


def test_differences_are_taken_within_seeds() -> None:
    _, line = lines_of(WHAT, {"fedit": BASE, "flexlora": OTHER}, CHOSEN)
    gaps = [0.6 + 0.03 * s - (0.5 + 0.01 * s) for s in SEEDS]
    want = stats.ttest_rel([0.6 + 0.03 * s for s in SEEDS], [0.5 + 0.01 * s for s in SEEDS])
    assert line.difference is not None
    assert line.difference.mean == pytest.approx(sum(gaps) / 3)
    assert line.p == pytest.approx(want.pvalue)
    # a spread over seeds that both share is no doubt about which is better
    shared = [0.0, 0.3, 0.6]
    a = [made([0.2 + s], [10]) for s in shared]
    b = [made([0.25 + s + 1e-6 * i], [10]) for i, s in enumerate(shared)]
    _, line = lines_of(WHAT, {"fedit": a, "flexlora": b}, CHOSEN)
    assert line.p is not None
    assert line.p < 1e-6 < 0.3 < (line.score.half or 0)


def test_the_baseline_is_compared_with_nobody_and_equal_runs_do_not_differ() -> None:
    base, same = lines_of(WHAT, {"fedit": BASE, "flexlora": BASE}, CHOSEN)
    assert (base.difference, base.p) == (None, None)
    assert same.difference is not None
    assert (same.difference.mean, same.p) == (0.0, 1.0)
    one = Comparison(("fedit", "flexlora"), "fedit", (1.0,), (0,), 8)
    _, line = lines_of(one, {"fedit": BASE[:1], "flexlora": OTHER[:1]}, CHOSEN)
    assert (line.p, line.score.half) == (None, None)


def test_equal_bytes_are_those_of_the_cheapest_run() -> None:
    assert sent(OTHER[0]) == [0, 40, 160, 460]
    base, other = lines_of(WHAT, {"fedit": BASE, "flexlora": OTHER}, CHOSEN)
    assert base.thrifty.mean == base.score.mean  # the cheapest: 200 bytes in all
    assert other.thrifty.mean == pytest.approx(0.4)  # after 160 of its 460
    assert at_bytes(OTHER[0], 39) == 0.1  # nothing sent yet: the initial model
    assert at_bytes(OTHER[0], 460) == 0.6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strategies": ()}, "strategies"),
        ({"seeds": (0, 0)}, "seeds"),
        ({"rates": ()}, "rates"),
        ({"baseline": "flora"}, "baseline"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"compare\.{said}"):
        Comparison(**{**vars(WHAT), **change})


def test_a_comparison_searches_on_validation_rows_then_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    import fedlora.api.compare as module
    import fedlora.report
    from fedlora.cli.main import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(fedlora.report, "write_report", lambda runs, to, *more: to)  # pictures are slow
    monkeypatch.setattr(module, "write_report", lambda runs, to, *more: to)
    words = ["compare", "--to", str(tmp_path / "out"), "model=tiny", "data=tiny", "clients=2", "rounds=1"]
    words += ["ranks=[2,4]", "client.steps=2", "compare.strategies=[fedit,flexlora]", "compare.rates=[1,3]"]
    words += ["compare.seeds=[0,1]", "compare.rank=3", "+data.source.rows=48", "+data.source.test_rows=16"]
    main(words)
    out = tmp_path / "out"
    searched = OmegaConf.load(out / "search" / "flexlora-x3" / "config.yaml")
    found = json.loads((out / "compare.json").read_text())
    fedit, flexlora = (f"{line['strategy']}-x{line['rate']:g}" for line in found["lines"])
    final = OmegaConf.load(out / "runs" / f"{flexlora}-1" / "config.yaml")
    assert (searched.evaluate.rows, searched.seed, searched.ranks) == ("validation", 0, [2, 4])
    assert searched.client.lr == pytest.approx(
        3 * OmegaConf.load(out / "search" / "flexlora-x1" / "config.yaml").client.lr
    )
    assert (final.evaluate.rows, final.seed, final.data.source.seed) == ("test", 1, 1)  # all that a seed says
    assert OmegaConf.load(out / "runs" / f"{fedit}-0" / "config.yaml").ranks == 3
    assert "the edge of compare.rates" in capsys.readouterr().out
    assert [line["strategy"] for line in found["lines"]] == ["fedit", "flexlora"]
    assert all(line["search"][0] == 2 for line in found["lines"])
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        ("fedit", "0"),
        ("fedit", "1"),
        ("flexlora", "0"),
        ("flexlora", "1"),
    ]
    best = max(
        (1, 3),
        key=lambda x: json.loads((out / "search" / f"fedit-x{x}" / "summary.json").read_text())["accuracy"],
    )
    assert math.isclose(found["lines"][0]["rate"], best)
    # again: nothing is run twice
    before = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    capsys.readouterr()
    main(words)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")} == before
    # with another rate: what is new is run, and only that
    main([*words, "compare.rates=[1,2,3]"])
    assert before.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("summary.json")}.items()
    assert (out / "search" / "fedit-x2" / "summary.json").exists()
    # with other settings: runs of the old ones are not taken for new ones
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words, "client.steps=3"])
    assert ended.value.code == 2
    assert "other settings (client)" in capsys.readouterr().err
