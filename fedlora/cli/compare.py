"""`fedlora compare`: strategies on one job, each at a learning rate of its own, over several seeds."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf
from rich.console import Console

from fedlora.api.compare import run_comparison, table_of
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.report.statistics import Comparison
from fedlora.runner.spec import RunSpec


def main(words: Sequence[str]) -> None:
    """The verb `compare`.

    Raises:
        FedLoraError: settings that cannot work, or a run that failed.
    """
    parser = argparse.ArgumentParser(
        prog="fedlora compare",
        description="Strategies on one job: a learning-rate search each, then runs over seeds.",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="for all runs and results; the same goes on")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="those of `fedlora run`, and compare.strategies=[...]",
    )
    given = parser.parse_args(list(words))
    overrides = ["experiment=compare", *given.overrides]
    asked = compose(overrides).compare
    tuples = {name: _several(asked[name]) for name in ("strategies", "rates", "seeds")}
    what = Comparison(**tuples, baseline=asked.baseline, rank=asked.rank)
    out = given.to or Path("runs") / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    console = Console()

    def spec_of(name: str, seed: int, rate: float, rows: str) -> RunSpec:
        config = compose([*overrides, f"strategy={name}", f"seed={seed}"])
        config.evaluate.rows, config.compare = rows, {}
        config.client.lr = float(config.client.lr) * rate
        if not get_class(config.strategy["_target_"]).mixed_ranks:  # type: ignore[attr-defined]
            config.ranks = what.rank
        return run_spec(config)

    try:
        lines, metric = run_comparison(what, spec_of, out, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command with --to {out} goes on") from None
    console.print(table_of(lines, metric))
    print(out / "compare.md")


def _several(given: Any) -> Any:
    return given if isinstance(given, str) else tuple(given) if OmegaConf.is_list(given) else (given,)
