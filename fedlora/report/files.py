"""The report's pictures as PNG files and its numbers as CSV files, for papers and spreadsheets."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.report import draw, plots
from fedlora.report.clients import holdings
from fedlora.report.compare import differences, labels, plain
from fedlora.report.read import Run
from fedlora.report.seeds import groups, interval

_SCALARS = (str, int, float, type(None))


def write_files(runs: Sequence[Run], to: Path) -> Path:
    """Write every picture and table of the page as a file; numbers have all their digits.

    Args:
        runs: the runs to show, in this order.
        to: the folder; files of the same names are replaced, others stay.
    """
    to.mkdir(parents=True, exist_ok=True)
    pictures = [*plots.results(runs), *plots.by_client(runs), *plots.aggregation(runs)]
    firsts = [group[0] for group in groups(runs)]
    # Clients that several settings share are drawn once, under the number of the first in over-seeds.csv.
    distinct = {str(holdings(run)): (at, run) for at, run in reversed([*enumerate(firsts, start=1)])}
    data = [one for at, run in distinct.values() if (one := plots.data(run, f"clients-{at}"))]
    for picture in [*pictures, *data]:
        (to / f"{picture.name}.png").write_bytes(draw.png(picture.figure))
    named = [*zip(labels(runs), runs, strict=True)]
    settings = differences(runs)
    _write(
        to / "runs.csv",
        [
            {"run": name, "folder": run.path.name, **{key: row[at] for key, row in settings.items()}}
            | {key: value for key, value in run.summary.items() if isinstance(value, _SCALARS)}
            for at, (name, run) in enumerate(named)
        ],
    )
    _write(to / "rounds.csv", [{"run": name, **row} for name, run in named for row in run.metrics])
    _write(
        to / "clients.csv",
        [{"run": name, **_public(run, row)} for name, run in named for row in run.clients],
    )
    _write(
        to / "over-seeds.csv",
        [
            {"runs": name, "folder": group[0].path.name, "seeds": len(group), **_over(group)}
            for name, group in zip(labels(firsts), groups(runs), strict=True)
        ],
    )
    return to


def _over(group: Sequence[Run]) -> dict[str, Any]:
    """The mean over seeds, with its 95 % interval, of every number of the summaries."""
    row: dict[str, Any] = {}
    numbers = [
        key for key, value in group[0].summary.items() if isinstance(value, float | int) and key != "seed"
    ]
    for key in numbers:
        found = interval(run.summary.get(key) for run in group)
        if found is not None:
            row[key], row[f"{key} ±"] = found
    return row


def _public(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "examples" or run.counts}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    header = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """A cell's text, escaped if a spreadsheet would read it as a formula."""
    if value is None or isinstance(value, float | int):
        return value
    text = plain(value)
    return f"'{text}" if text[:1] in "=+-@" and text else text
