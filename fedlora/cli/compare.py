"""`fedlora compare`: several strategies on one job, each at a learning rate of its own, over several seeds.

The rate is searched on a validation part of the training rows, never on the test rows: so many runs, on one
seed. Then every strategy runs once a seed. All see the rows, partition, sampling and batches of a seed, so
differences are taken within seeds. Results stand at equal rounds, and at equal bytes: at the last round by
which a run had sent no more than the cheapest one has in all.
"""

import argparse
import csv
import datetime
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from fedlora.cli.run_job import run_job
from fedlora.cli.statistics import Comparison, Line, at_bytes, last, lines_of, sent, worth
from fedlora.config.composition import compose
from fedlora.config.instantiate import differences, kept
from fedlora.errors import ConfigError
from fedlora.report import read_run, write_report
from fedlora.report.read import Run
from fedlora.storage.atomic import write_whole
from fedlora.storage.run_folder import RunFolder

Go = Callable[[DictConfig, Console], Path]


def compare(
    what: Comparison, composed: Callable[[str, int], DictConfig], go: Go, out: Path, console: Console
) -> list[Line]:
    """Search, run and compare; what was done before in the same folder is not done again.

    Args:
        what: strategies, rates and seeds.
        composed: from a strategy's name and a seed to the job's configuration with them.
        go: runs a configuration and returns its folder.
        out: a folder for all runs and the results.
        console: where to show progress.
    """
    one = partial(_one, what, composed, go, console)
    chosen: dict[str, tuple[float, int, float]] = {}
    for name in what.strategies:
        tried = []
        if len(what.rates) > 1:
            places = [(rate, out / "search" / f"{name}-x{rate:g}") for rate in what.rates]
            tried = [(rate, one(name, rate, what.seeds[0], place, "validation")) for rate, place in places]
        rate = max(tried, key=lambda found: worth(found[1]))[0] if tried else what.rates[0]
        chosen[name] = (rate, len(tried), sum(run.summary["wall_seconds"] for _, run in tried))
        edge = len(tried) > 1 and rate in (min(what.rates), max(what.rates))
        beyond = ", the edge of compare.rates: a better one may lie beyond" if edge else ""
        console.print(f"{name}: learning rate x{rate:g}{beyond}", highlight=False)
    runs = {
        name: [one(name, rate, seed, _run(out, name, rate, seed), "test") for seed in what.seeds]
        for name, (rate, _, _) in chosen.items()
    }
    lines = lines_of(what, runs, chosen)
    _write(out, what, runs, lines)
    return lines


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

    def composed(name: str, seed: int) -> DictConfig:
        return compose([*overrides, f"strategy={name}", f"seed={seed}"])

    try:
        lines = compare(what, composed, run_job, out, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command with --to {out} goes on") from None
    (rate,) = (line.rate for line in lines if line.strategy == what.baseline)
    console.print(table_of(lines, read_run(_run(out, what.baseline, rate, what.seeds[0])).metric))
    print(out / "compare.md")


def _several(given: Any) -> Any:
    return given if isinstance(given, str) else tuple(given) if OmegaConf.is_list(given) else (given,)


def table_of(lines: Sequence[Line], metric: str) -> Table:
    """The result for the terminal."""
    heads = ("strategy", "rate", "equal rounds", "to baseline", "p", "equal bytes", "MB", "s", "search")
    table = Table(*heads, box=None, padding=(0, 2, 0, 0), title=f"{metric}, mean and 95 % interval")
    for line in lines:
        table.add_row(*_cells(line))
    return table


def _cells(line: Line) -> list[str]:
    apart = "-" if line.difference is None else f"{line.difference.mean:+.3f}"
    if line.difference is not None and line.difference.half is not None:
        apart += f" ± {line.difference.half:.3f}"
    return [
        line.strategy,
        f"x{line.rate:g}",
        str(line.score),
        apart,
        "-" if line.p is None else f"{line.p:.3f}",
        str(line.thrifty),
        f"{line.megabytes:.1f}",
        f"{line.seconds:.0f}",
        f"{line.search[0]} runs {line.search[1]:.0f} s",
    ]


def _one(
    what: Comparison,
    composed: Callable[[str, int], DictConfig],
    go: Go,
    console: Console,
    name: str,
    rate: float,
    seed: int,
    out: Path,
    on: str,
) -> Run:
    """One run, or what is left of it."""
    config = composed(name, seed).copy()
    config.out, config.evaluate.rows, config.compare = str(out), on, {}
    config.client.lr = float(config.client.lr) * rate
    if not _mixes(config):
        config.ranks = what.rank
    if (out / "config.yaml").exists():
        if names := differences(kept(config), out, {"out", "resume"}):
            raise ConfigError(
                f"--to: '{out}' holds a run with other settings ({', '.join(names)}); name another folder"
            )
        config.resume = str(out)
    if not (out / "summary.json").exists():
        if config.resume and not RunFolder(out).started:
            console.print(f"{out}: begins again", highlight=False)
        go(config, console)
    return read_run(out)


def _run(out: Path, name: str, rate: float, seed: int) -> Path:
    """Where a run lies; one at another rate lies elsewhere, since a comparison may be given more rates."""
    return out / "runs" / f"{name}-x{rate:g}-{seed}"


def _mixes(config: DictConfig) -> bool:
    from hydra.utils import get_class

    return bool(get_class(config.strategy["_target_"]).mixed_ranks)  # type: ignore[attr-defined]


def _write(out: Path, what: Comparison, runs: Mapping[str, Sequence[Run]], lines: Sequence[Line]) -> None:
    """compare.json, compare.csv with a line a run, compare.md, and the report on all runs."""
    found = {"comparison": asdict(what), "lines": [asdict(line) for line in lines]}
    text = json.dumps(found, indent=2) + "\n"
    write_whole(out / "compare.json", lambda file: file.write_text(text, "utf-8"))
    metric = next(iter(runs.values()))[0].metric
    budget = min(sent(run)[-1] for each in runs.values() for run in each)
    rows: list[list[Any]] = [["strategy", "seed", metric, f"{metric}_at_bytes", "bytes", "seconds"]]
    for name, each in runs.items():
        for seed, run in zip(what.seeds, each, strict=True):
            rows.append(
                [name, seed, last(run), at_bytes(run, budget), sent(run)[-1], run.summary["wall_seconds"]]
            )
    plain = io.StringIO()
    csv.writer(plain).writerows(rows)
    write_whole(out / "compare.csv", lambda file: file.write_text(plain.getvalue(), "utf-8"))
    heads = ["strategy", "rate", f"{metric}, equal rounds", "to the baseline", "p"]
    heads += [f"{metric}, {budget / 1e6:.1f} MB", "MB a run", "s a run", "search"]
    shown = [heads, ["---"] * len(heads), *map(_cells, lines)]
    page = "\n".join(f"| {' | '.join(cells)} |" for cells in shown) + "\n"
    write_whole(out / "compare.md", lambda file: file.write_text(page, "utf-8"))
    write_report([run for each in runs.values() for run in each], out / "report.html")
