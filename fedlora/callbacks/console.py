"""What the user sees while a run goes on: a live table in a terminal, one line a round anywhere else."""

import time
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

COLUMNS = ("round", "loss", "accuracy", "train loss", "down", "up", "clients", "dropped", "seconds", "left")
SHOWN = 15  # rounds that the live table keeps in sight


class Display(Protocol):
    """What a run tells its user while it goes on."""

    def begin(self, round: int, clients: int) -> None:
        """A round begins with so many clients."""

    def advance(self, clients: int) -> None:
        """So many clients have finished."""

    def end(self, metrics: dict[str, Any]) -> None:
        """A round has ended with this line of metrics.jsonl."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""


class Progress:
    """The display of one run, for use in a `with` block.

    Args:
        rounds: in all.
        done: rounds finished before (a resumed run).
        metric: the task's own metric, such as "accuracy" or "perplexity".
        console: where to print; a terminal gets the live table.
        private: whether there is an epsilon to show.
        sites: whether clients are sites, which may be away.
    """

    def __init__(
        self,
        rounds: int,
        done: int,
        metric: str,
        console: Console,
        private: bool = False,
        sites: bool = False,
    ) -> None:
        self._rounds, self._done, self._metric, self._console = rounds, done, metric, console
        self._private, self._sites = private, sites
        self._lines: list[list[str]] = []
        self._spent: list[float] = []
        self._round_began = time.monotonic()
        self._live: Live | None = None
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._bar.update(self._task, visible=False)
            self._live.update(self._picture())
            self._live.__exit__(*error)

    def begin(self, round: int, clients: int) -> None:
        """A round begins with so many clients."""
        self._bar.reset(self._task, total=clients, description=f"round {round} of {self._rounds}, clients")

    def advance(self, clients: int) -> None:
        """So many clients have finished."""
        self._bar.advance(self._task, clients)
        self._show()

    def end(self, metrics: dict[str, Any]) -> None:
        """A round has ended with this line of metrics.jsonl."""
        self._spent.append(metrics["seconds"])
        left = (self._rounds - metrics["round"]) * sum(self._spent) / len(self._spent)
        cells = [
            f"{metrics['round']}/{self._rounds}",
            _number(metrics.get("loss")),
            _number(metrics.get(self._metric)),
            _number(metrics.get("train_loss")),
            megabytes(metrics["bytes_down"]),
            megabytes(metrics["bytes_up"]),
            str(metrics["clients"]),
            str(metrics["dropped"]),
            f"{metrics['seconds']:.1f}",
            f"{int(left) // 60}:{int(left) % 60:02d}",
        ]
        if self._sites:
            cells.append(", ".join(metrics.get("away", [])) or "-")
        if self._private:
            cells.append(_number(metrics["epsilon"]) + ("" if metrics["epsilon_valid"] else " (not valid)"))
        self._lines.append(cells)
        if self._live is None:
            named = zip(self._headings(), cells, strict=True)
            self._console.print("  ".join(f"{name} {cell}" for name, cell in named), soft_wrap=True)
        self._show()

    def warn(self, text: str) -> None:
        """Something that the user should know, beside the table."""
        self._console.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)

    def _headings(self) -> list[str]:
        more = {"away": self._sites, "epsilon": self._private}
        names = [*COLUMNS, *(name for name, shown in more.items() if shown)]
        return [self._metric if name == "accuracy" else name for name in names]

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._picture())

    def _picture(self) -> Group:
        table = Table(*self._headings(), box=None, padding=(0, 2, 0, 0))
        for column in table.columns:
            column.justify = "right"
        for line in self._lines[-SHOWN:]:
            table.add_row(*line)
        return Group(table, self._bar)


def megabytes(count: float) -> str:
    """Bytes as MB with a digit or two."""
    return f"{count / 1e6:.2f} MB" if count < 1e7 else f"{count / 1e6:.1f} MB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
