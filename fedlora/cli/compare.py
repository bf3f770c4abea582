"""`fedlora compare`: strategies on one job, each at a learning rate of its own, over several seeds."""

import datetime
from pathlib import Path
from typing import Any

import click

from .words import overrides


@click.command(short_help="Strategies at learning rates of their own, over seeds.")
@click.option(
    "--to", metavar="DIR", help="A folder for all runs and results; the same command goes on in it."
)
@overrides
def command(to: str | None, words: tuple[str, ...]) -> None:
    """Search each strategy's learning rate on validation rows, then run it over seeds.

    KEY=VALUE are those of `fedlora run`, and compare.strategies=[...], compare.rates, compare.seeds,
    compare.baseline, compare.rank.
    """
    from hydra.utils import get_class
    from omegaconf import OmegaConf
    from rich.console import Console

    from fedlora.api.compare import run_comparison, table_of
    from fedlora.config.composition import compose
    from fedlora.config.translate import run_spec
    from fedlora.report.statistics import Comparison
    from fedlora.runner.spec import RunSpec

    def several(given: Any) -> Any:
        return given if isinstance(given, str) else tuple(given) if OmegaConf.is_list(given) else (given,)

    said = ["experiment=compare", *words]
    asked = compose(said).compare
    tuples = {name: several(asked[name]) for name in ("strategies", "rates", "seeds")}
    what = Comparison(**tuples, baseline=asked.baseline, rank=asked.rank)
    out = Path(to) if to else Path("runs") / f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    console = Console()

    def spec_of(name: str, seed: int, rate: float, rows: str) -> RunSpec:
        config = compose([*said, f"strategy={name}", f"seed={seed}"])
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
