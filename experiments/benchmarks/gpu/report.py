"""What the benchmark says: tables and goals on the screen and in a text file, and all of it as JSON."""

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.storage.atomic import write_whole

Cell = str | float | int | bool | None


@dataclass
class Section:
    """What one section has found so far.

    Args:
        name: as `--section` has it.
        began: on the clock of `time.monotonic`.
        tables: title -> its rows, each by column.
        goals: what was judged, and whether it is met; None where it cannot be judged.
        notes: further lines.
        error: the traceback of what ended the section early.
        seconds: how long it took.
    """

    name: str
    began: float = field(default_factory=time.monotonic)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


class Report:
    """Prints each line as soon as it is known, and keeps it for `gpu.txt` and `gpu.json`.

    Args:
        folder: where both files go; it is made if it is missing.
        about: what the JSON says of the run as a whole.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.about = dict(about)
        self.sections: list[Section] = []
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.txt").write_text("", encoding="utf-8")

    @property
    def now(self) -> Section:
        """The section that is under way."""
        return self.sections[-1]

    def say(self, line: str = "") -> None:
        """Print a line, and add it to `gpu.txt`."""
        print(line, flush=True)
        with (self._folder / "gpu.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def begin(self, name: str) -> None:
        """Begin a section."""
        self.sections.append(Section(name))

    def table(self, title: str, columns: Sequence[str]) -> "Table":
        """Begin a table: its title and its head are printed now."""
        self.say(f"\n{title}\n")
        self.say(f"| {' | '.join(columns)} |")
        self.say("|" + "--|" * len(columns))
        return Table(self, columns, self.now.tables.setdefault(title, []))

    def note(self, line: str) -> None:
        """Say something beside the tables."""
        self.now.notes.append(line)
        self.say(line)

    def goal(self, number: int, what: str, met: bool | None) -> None:
        """Say whether a goal of the section is met; None where this run cannot judge it."""
        self.now.goals.append({"goal": number, "what": what, "met": met})
        word = "not judged here" if met is None else "met" if met else "NOT MET"
        self.say(f"goal {number}: {what}: {word}")

    def end(self, error: BaseException | None = None) -> None:
        """End the section, say in a line what went wrong if anything did, and write the JSON."""
        self.now.seconds = round(time.monotonic() - self.now.began, 2)
        if error is not None:
            self.now.error = "".join(traceback.format_exception(error))
            first = (str(error).strip() or "no message").splitlines()[0]
            self.say(f"{self.now.name} ended early: {type(error).__name__}: {first:.300}")
        self.say(f"({self.now.name}: {self.now.seconds:.0f} s)")
        self.write()

    def write(self) -> None:
        """Write `gpu.json` whole."""
        found = self.about | {"sections": {one.name: vars(one) for one in self.sections}}
        text = json.dumps(found, indent=1, default=str) + "\n"
        write_whole(self._folder / "gpu.json", lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Table:
    """A table that grows.

    Args:
        report: where its rows are printed.
        columns: their names, in order.
        rows: what is kept for the JSON.
    """

    report: Report
    columns: Sequence[str]
    rows: list[dict[str, Any]]

    def row(self, *cells: Cell, **kept: Any) -> None:
        """Add a row and print it; what is `kept` stands beside it in the JSON alone."""
        self.rows.append(dict(zip(self.columns, cells, strict=True)) | kept)
        self.report.say(f"| {' | '.join(map(shown, cells))} |")


def shown(cell: Cell) -> str:
    """A cell as the table prints it: three digits of a fraction, a thousand's comma in a whole number."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return cell
