"""The tables of the report; the HTML page and the terminal show the same cells."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fedlora.report.compare import ABSENT, clean, differences, labels, plain, words
from fedlora.report.read import Run, number

_SETTINGS = ("model", "data", "clients", "ranks", "rounds", "seed")
_WIDE = 160  # width in characters where the output is no terminal
_NUMBER = re.compile(r"–|[\d.,e+-]+( \(\d+\)|( [±→] |–)[\d.,e+-]+)?")


@dataclass(frozen=True)
class Table:
    """A table of formatted cells. Without a header, each row is a name and its value.

    `table.show()` prints it.

    Args:
        title: the title.
        header: the name of each column; empty for rows of names and values.
        rows: the formatted cells.
        note: a remark below the table; empty for none.
        marked: the indices of highlighted rows.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    marked: frozenset[int] = frozenset()

    def left(self, column: int) -> bool:
        """Whether a column is aligned left, because it has words rather than numbers."""
        return not all(_NUMBER.fullmatch(row[column]) for row in self.rows)

    def show(self) -> None:
        """Print the table, to a width of 160 where the output is no terminal; rich would assume 80."""
        Console(width=None if sys.stdout.isatty() else _WIDE).print(self)

    def __rich__(self) -> RichTable:
        """The table for a terminal; markup of rich in cells is shown literally."""
        shown = RichTable(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text(self.note) if self.note else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_header=bool(self.header),
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for at, name in enumerate(self.header or ["", ""]):
            left = not self.header or self.left(at)
            shown.add_column(Text(name), justify="left" if left else "right")
        for at, row in enumerate(self.rows):
            shown.add_row(*map(Text, row), style="red" if at in self.marked else None)
        return shown


def score(value: object, metric: str) -> str:
    """A metric's value with three decimals, or two for perplexity."""
    found = number(value)
    return ABSENT if found is None else f"{found:,.{2 if metric == 'perplexity' else 3}f}"


def amounts(values: Sequence[object]) -> list[str]:
    """The cells of a column with equal decimals, such that the largest has three significant digits."""
    found = [number(value) for value in values]
    sizes = [math.floor(math.log10(abs(value))) for value in found if value]
    decimals = min(6, max(0, 2 - max(sizes), -min(sizes))) if sizes else 0
    return [ABSENT if value is None else f"{value:,.{decimals}f}" for value in found]


def megabytes(values: Sequence[object]) -> list[str]:
    """The cells of a column of bytes, in MB (10⁶ bytes)."""
    return amounts([None if (found := number(value)) is None else found / 1e6 for value in values])


def runs_table(runs: Sequence[Run]) -> Table:
    """A row for each run, with settings that all share in the note; a single run as names and values."""
    columns: dict[str, list[str]] = {"run": labels(runs)}
    for key in _SETTINGS:
        columns[key] = [setting(run.summary.get(key)) for run in runs]
    for metric in sorted({"token_accuracy", *(run.metric for run in runs)}):
        columns[words(metric)] = [score(run.summary.get(metric), metric) for run in runs]
    columns["best (round)"] = [_best(run) for run in runs]
    columns["loss"] = [score(run.summary.get("loss"), "loss") for run in runs]
    columns["ε"] = amounts([_last(run, "epsilon") for run in runs])
    columns["dropped"] = [str(sum(row.get("dropped") or 0 for row in run.metrics)) for run in runs]
    columns["MB down"] = megabytes([run.summary.get("bytes_down") for run in runs])
    columns["MB up"] = megabytes([run.summary.get("bytes_up") for run in runs])
    columns["seconds"] = amounts([run.summary.get("wall_seconds") for run in runs])
    columns["virtual s"] = amounts([run.summary.get("virtual_seconds") for run in runs])
    columns["virtual s to best"] = amounts([_time_of_best(run) for run in runs])
    columns["MB RAM"] = amounts([run.summary.get("peak_memory_mb") for run in runs])
    columns["adapter"] = [_hash(run)[:8] for run in runs]
    shown = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    if len(runs) == 1:
        return Table("The run", [], [[name, cells[0]] for name, cells in shown.items()])
    same = [key for key in (*_SETTINGS, "dropped") if len(set(columns[key])) == 1]
    note = "; ".join(f"{key} {shown.pop(key)[0]}" for key in same if key in shown)
    return Table("The runs", [*shown], turned(shown), f"In all runs: {note}." if note else "")


def differences_table(runs: Sequence[Run]) -> Table:
    """The settings that differ between runs, a column each, beside the column of labels."""
    columns = {"run": labels(runs), **differences(runs)}
    return Table("What differs", [*columns], turned(columns))


def changes_table(run: Run, defaults: Mapping[str, Any]) -> Table:
    """The settings of one run that differ from the defaults, a row each."""
    usual = replace(run, config=dict(defaults))
    found = differences([usual, run], also=("strategy",))
    rows = [[key, *values] for key, values in found.items() if values[1] != ABSENT]
    return Table("What differs from the defaults", ["setting", "default", "here"], rows)


def privacy_table(runs: Sequence[Run]) -> Table | None:
    """Each private run's unit, epsilon, budget and noise, with the definition below; None without any."""
    private = [run for run in runs if isinstance(run.summary.get("ledger"), dict)]
    if not private:
        return None
    ledgers = [run.summary["ledger"] for run in private]
    columns = {
        "run": [name for name, run in zip(labels(runs), runs, strict=True) if run in private],
        "unit": [setting(ledger.get("unit")) for ledger in ledgers],
        "ε": amounts([run.summary.get("epsilon") for run in private]),
        "budget": amounts([ledger.get("budget") for ledger in ledgers]),
        "δ": [f"{run.summary.get('delta') or 0:g}" for run in private],
        "clip": [setting(ledger.get("clip")) for ledger in ledgers],
        "σ, least": amounts([_last(run, "sigma") for run in private]),
        "clipped, share": [score(_last(run, "clipped"), "loss") for run in private],
        "noise": ["random" if ledger.get("valid") else "NOT VALID, from a test seed" for ledger in ledgers],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    said = sorted({clean(ledger.get("adjacency")) for ledger in ledgers})
    left = sorted({clean(item) for ledger in ledgers for item in ledger.get("not_covered") or []})
    note = (
        "ε and δ are those of the whole run; of several clients, those of the one with the largest ε. "
        f"Definition: {'. Or: '.join(said)}. Not covered by ε: {'; '.join(left)}."
    )
    marked = frozenset(at for at, ledger in enumerate(ledgers) if not ledger.get("valid"))
    return Table("Privacy", [*shown], turned(shown), note, marked)


def provenance_table(runs: Sequence[Run]) -> Table:
    """The folder of each run, its adapter's SHA-256, and the versions of the libraries."""
    columns = {
        "run": labels(runs),
        "folder": [clean(run.path.name) for run in runs],
        "SHA-256": [_hash(run) for run in runs],
    }
    versions = [plain(run.summary.get("versions") or {}).replace(": ", " ") for run in runs]
    if len(set(versions)) > 1:
        columns["versions"] = versions
    note = f"Made with {versions[0]}." if len(set(versions)) == 1 and versions[0] else ""
    return Table("Adapters and versions", [*columns], turned(columns), note)


def turned(columns: dict[str, list[str]]) -> list[list[str]]:
    """The rows of a table that is given by columns."""
    return [list(row) for row in zip(*columns.values(), strict=True)]


def setting(value: object) -> str:
    """A setting as text; a list of more than 8 numbers is shown as its range."""
    if value is None:
        return ABSENT
    if isinstance(value, list) and len(value) > 8:
        return f"{min(value)}–{max(value)}"
    return plain(value)


def _best(run: Run) -> str:
    """The best value of the headline metric and the first round that reached it."""
    if (found := _best_round(run)) is None:
        return ABSENT
    return f"{score(found[1], run.metric)} ({found[0]})"


def _best_round(run: Run) -> tuple[int, float] | None:
    """The first round with the best value of the headline metric, and that value."""
    measured = run.series(run.metric)
    return (max if run.more_is_better else min)(measured, key=lambda point: point[1]) if measured else None


def _time_of_best(run: Run) -> float | None:
    """When, in virtual seconds, the best value of the headline metric was reached."""
    times, found = dict(run.series("virtual_seconds")), _best_round(run)
    return None if found is None else {0: 0.0, **times}.get(found[0]) if times else None


def _last(run: Run, key: str) -> float | None:
    values = run.series(key)
    return values[-1][1] if values else None


def _hash(run: Run) -> str:
    return clean(run.summary.get("adapter_sha256") or ABSENT)
