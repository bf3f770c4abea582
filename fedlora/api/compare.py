"""Several strategies on one job, each at a learning rate of its own, over several seeds.

The rate is searched on a validation part of the training rows, never on the test rows: so many runs, on one
seed. Then every strategy runs once a seed. All see the rows, partition, sampling and batches of a seed, so
differences are taken within seeds. Results stand at equal rounds, and at equal bytes: at the last round by
which a run had sent no more than the cheapest one has in all.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora.config.instantiate import differences
from fedlora.errors import ConfigError
from fedlora.report import read_run, write_report
from fedlora.report.read import Run
from fedlora.report.statistics import Comparison, Line, at_bytes, last, lines_of, sent, worth
from fedlora.runner.spec import RunSpec
from fedlora.storage.atomic import write_whole
from fedlora.storage.run_folder import RunFolder
from fedlora.training.client import Client

from .parts import client_of, model_of, strategy_of
from .scratch import Scratch
from .signature import takes_settings
from .simulate import carry_out, make_spec

RATES, SEEDS, RANK = (0.5, 1.0, 2.0, 4.0), (0, 1, 2), 8
# From a strategy's name, a seed, a factor on its learning rate, and the rows to evaluate on.
SpecOf = Callable[[str, int, float, str], RunSpec]


@dataclass(frozen=True)
class Compared:
    """What a comparison has found.

    Args:
        lines: one a strategy: score, difference to the baseline, p-value, score at equal bytes, cost.
        metric: the headline metric.
        folder: where runs, tables and the report are.
        kept: keeps a temporary folder.
    """

    lines: Sequence[Line]
    metric: str
    folder: Path
    kept: Scratch | None = None

    def table(self) -> Table:
        """The lines as a table of rich, which prints in a terminal and in a notebook."""
        return table_of(self.lines, self.metric)


@takes_settings
def compare(
    strategies: Sequence[str],
    model: Any = "minilm",
    data: Any = "trec",
    *,
    baseline: str | None = None,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    rank: int = RANK,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Compared:
    """Compare strategies, each at the learning rate that suits it best, over seeds.

    Args:
        strategies: names, such as ["fedit", "flexlora"].
        model: as for `simulate`.
        data: as for `simulate`.
        baseline: the one that all others are compared with; None takes the first.
        rates: factors on each strategy's own learning rate that the search tries; with one there is none.
        seeds: of the runs; the search takes the first.
        rank: of all clients, for strategies that know no mixed ranks.
        out: a folder for all runs and results, in which the same call goes on; None keeps nothing.
        progress: whether to show tables of the rounds.
        settings: as for `simulate`, without strategy and seed.

    Raises:
        FedLoraError: settings that cannot work, or a run that failed.
    """
    what = Comparison(tuple(strategies), baseline or strategies[0], tuple(rates), tuple(seeds), rank)

    def spec_of(name: str, seed: int, rate: float, rows: str) -> RunSpec:
        strategy, evaluate = strategy_of(name), settings.get("evaluate", {})
        evaluate = {**(evaluate if isinstance(evaluate, Mapping) else asdict(evaluate)), "rows": rows}
        client = settings.get("client")
        if client is None:
            targets = replace(make_spec(model, data, settings).lora)
            client = client_of(strategy, model_of(model)[0], targets)
        more = {"strategy": strategy, "seed": seed, "evaluate": evaluate, "client": with_rate(client, rate)}
        if not strategy.mixed_ranks:
            more["ranks"] = rank
        return make_spec(model, data, settings | more)

    kept = Scratch() if out is None else None
    folder = Path(out) if out is not None else kept.path  # type: ignore[union-attr]
    return Compared(*run_comparison(what, spec_of, folder, Console(quiet=not progress)), folder, kept)


def with_rate(client: Client, factor: float) -> Client:
    """A client whose learning rate is so many times its own.

    Raises:
        ConfigError: it has none.
    """
    if hasattr(client, "lr"):
        return replace(client, lr=client.lr * factor)  # type: ignore[type-var, no-any-return]
    if hasattr(client, "local"):
        return replace(client, local=with_rate(client.local, factor))  # type: ignore[type-var, no-any-return]
    raise ConfigError(f"compare: client {type(client).__name__} has no lr to search; give rates=[1.0]")


def run_comparison(what: Comparison, spec_of: SpecOf, out: Path, console: Console) -> tuple[list[Line], str]:
    """Search, run and compare; what was done before in the same folder is not done again.

    Args:
        what: strategies, rates and seeds.
        spec_of: gives the description of a run.
        out: a folder for all runs and the results.
        console: where to show progress.

    Returns:
        A line a strategy, and the headline metric.
    """

    def one(name: str, rate: float, seed: int, place: Path, rows: str) -> Run:
        return _one(spec_of(name, seed, rate, rows), place, console)

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
        name: [one(name, rate, seed, _place(out, name, rate, seed), "test") for seed in what.seeds]
        for name, (rate, _, _) in chosen.items()
    }
    lines = lines_of(what, runs, chosen)
    _write(out, what, runs, lines)
    return lines, next(iter(runs.values()))[0].metric


def _one(spec: RunSpec, out: Path, console: Console) -> Run:
    """One run, or what is left of it."""
    resumed = (out / "config.yaml").exists()
    if resumed and (names := differences(spec.settings, out, {"out", "resume"})):
        raise ConfigError(
            f"--to: '{out}' holds a run with other settings ({', '.join(names)}); name another folder"
        )
    if not (out / "summary.json").exists():
        if resumed and not RunFolder(out).started:
            console.print(f"{out}: begins again", highlight=False)
        carry_out(spec, out, resumed, not console.quiet)
    return read_run(out)


def _place(out: Path, name: str, rate: float, seed: int) -> Path:
    """Where a run lies; one at another rate lies elsewhere, since a comparison may be given more rates."""
    return out / "runs" / f"{name}-x{rate:g}-{seed}"


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
