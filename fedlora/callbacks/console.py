"""What the user sees while a run goes on: a live table in a terminal, one line a round anywhere else."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fedlora.callbacks.base import Callback, RunHandle

COLUMNS = ("round", "loss", "accuracy", "train loss", "down", "up", "clients", "dropped", "seconds", "left")
SHOWN = 15  # rounds that the live table keeps in sight


class ConsoleProgress(Callback):
    """A live table of the rounds in a terminal, and one line a round anywhere else.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None

    def on_run_begin(self, run: RunHandle) -> None:
        """Put the table up, where there is a terminal."""
        self._run = run
        self._lines: list[list[str]] = []
        self._spent: list[float] = []
        self._timed = False  # whether there is virtual time
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("starting", total=None)
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4)
            self._live.__enter__()

    def on_run_end(self, run: RunHandle, summary: Mapping[str, Any]) -> None:
        """Leave the table as it is."""
        if self._live is not None:
            live, self._live = self._live, None
            self._bar.update(self._task, visible=False)
            live.update(self._picture())
            live.__exit__(None, None, None)

    def on_round_begin(self, run: RunHandle, round: int, clients: int) -> None:
        """Start the bar of the round's clients anew."""
        self._bar.reset(self._task, total=clients, description=f"round {round} of {run.rounds}, clients")

    def on_client_done(self, run: RunHandle, count: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, count)
        self._show()

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        """Add the round's row."""
        self._spent.append(metrics["seconds"])
        left = (run.rounds - metrics["round"]) * sum(self._spent) / len(self._spent)
        cells = [
            f"{metrics['round']}/{run.rounds}",
            _number(metrics.get("loss")),
            _number(metrics.get(run.metric)),
            _number(metrics.get("train_loss")),
            megabytes(metrics["bytes_down"]),
            megabytes(metrics["bytes_up"]),
            str(metrics["clients"]),
            str(metrics["dropped"]),
            f"{metrics['seconds']:.1f}",
            f"{int(left) // 60}:{int(left) % 60:02d}",
        ]
        if run.sites:
            cells.append(", ".join(metrics.get("away", [])) or "-")
        if run.private:
            cells.append(_number(metrics["epsilon"]) + ("" if metrics["epsilon_valid"] else " (not valid)"))
        if "virtual_seconds" in metrics:
            self._timed = True
            cells.append(f"{metrics['virtual_seconds']:.1f}")
        self._lines.append(cells)
        if self._live is None:
            named = zip(self._headings(), cells, strict=True)
            self._console.print("  ".join(f"{name} {cell}" for name, cell in named), soft_wrap=True)
        self._show()

    def on_warning(self, run: RunHandle, text: str) -> None:
        """Print it beside the table."""
        self._console.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)

    def _headings(self) -> list[str]:
        more = {"away": self._run.sites, "epsilon": self._run.private, "virtual s": self._timed}
        names = [*COLUMNS, *(name for name, shown in more.items() if shown)]
        return [self._run.metric if name == "accuracy" else name for name in names]

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
