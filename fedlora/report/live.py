"""What `fedlora watch` shows: a picture of one run or of several, a line a round, and how each has ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedlora.callbacks.console import megabytes
from fedlora.report.progress import Progress, sparkline
from fedlora.report.read import number

NAMES = 6  # of clients in a line
CURVE = 32  # characters of a run's curve; half of them in a table of several runs
SHOWN = 5  # warnings in a picture


def picture(runs: Sequence[Progress], waiting: Sequence[str] = ()) -> RenderableType:
    """The present state of a run, or a table of several.

    Args:
        runs: in their order.
        waiting: the names of jobs of a sweep that have not begun.
    """
    return _one(runs[0]) if len(runs) == 1 and not waiting else _several(runs, waiting)


def round_line(run: Progress, line: Mapping[str, Any]) -> str:
    """A round in one line of text."""
    dropped = run.named("dropped") if line is run.metrics[-1] else []
    away = [str(name) for name in line.get("away", [])]
    cells = [
        f"round {line['round']}/{run.rounds}",
        f"{run.metric} {_number(line.get(run.metric))}",
        *([f"train loss {loss:.3f}"] if (loss := number(line.get("train_loss"))) is not None else []),
        f"clients {line['clients']}",
        f"dropped {line['dropped']}{_who(dropped)}",
        *([f"away {len(away)}{_who(away)}"] if away else []),
        *([f"epsilon {_spent(run, spent)}"] if (spent := number(line.get("epsilon"))) is not None else []),
        f"down {megabytes(line['bytes_down'])}",
        f"up {megabytes(line['bytes_up'])}",
        f"seconds {line['seconds']:.1f}",
    ]
    if (virtual := number(line.get("virtual_seconds"))) is not None:
        cells.append(f"virtual seconds {virtual:.0f}")
    if line is run.metrics[-1] and run.left is not None:
        cells.append(f"left {clock(run.left)}")
    return "  ".join(cells)


def ending(run: Progress) -> str:
    """How a run has ended, and what to do; that it goes on, where it does."""
    where = f"{run.path}"
    if run.stage == "finished":
        score = number(run.summary.get(run.metric))
        said = "" if score is None else f", {run.metric} {score:.3f}"
        stopped = f", stopped: {run.summary['stopped']}" if "stopped" in run.summary else ""
        return f"{where}: finished after round {run.done}{said}{stopped}; fedlora report {where}"
    if run.stage == "died":
        return (
            f"{where}: died after round {run.done} of {run.rounds}, no process holds it any more; "
            f"fedlora run resume={where} goes on"
        )
    if run.stage == "failed":
        return f"{where}: failed: {run.why.partition(': ')[2] or run.why}"
    if run.stage == "elsewhere":
        return (
            f"{where}: {run.why}, whose server writes the rounds; fedlora run resume={where} follows it, and "
            "at the server fedlora watch does, in the folder $FEDLORA_STATE"
        )
    return f"{where}: goes on, round {run.done + 1} of {run.rounds}"


def unfinished(folder: Path, waiting: Sequence[str]) -> str:
    """That jobs of a sweep have not begun, and how to begin them."""
    count = f"{len(waiting)} job{'s' * (len(waiting) > 1)}"
    return f"{folder}: {count} not begun; fedlora run -m resume={folder} goes on with what is missing"


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _one(run: Progress) -> RenderableType:
    rows = [
        ("run", f"{run.title}, {run.stage}, {run.path}"),
        ("round", f"{run.done} of {run.rounds}{_waited(run)}"),
        (run.metric, _course(run, CURVE) + _best(run)),
    ]
    if run.metrics:
        rows += [
            ("clients", _clients(run)),
            ("bytes", _bytes(run)),
            ("time", _time(run)),
        ]
    if run.epsilon is not None:
        rows.insert(3, ("epsilon", f"{_spent(run, run.epsilon)} spent"))
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    warnings = [Text(f"warning: {text}", style="yellow") for text in run.warnings]
    return Group(table, *warnings[:SHOWN], *_more(len(warnings) - SHOWN))


def _several(runs: Sequence[Progress], waiting: Sequence[str]) -> RenderableType:
    names = ("run", "stage", "round", "metric", "curve", "epsilon", "dropped", "s/round", "left")
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for run in runs:
        value = run.course[-1][1] if run.course else None
        cells = (
            run.path.name,
            run.stage,
            f"{run.done}/{run.rounds}",
            f"{run.metric} {_number(value)}",
            sparkline([value for _, value in run.course], CURVE // 2),
            _number(run.epsilon),
            f"{run.total('dropped'):.0f}",
            _number(run.round_seconds, 1),
            "-" if run.left is None else clock(run.left),
        )
        table.add_row(*map(Text, cells))
    for job in waiting:
        table.add_row(Text(job), Text("not begun"))
    count = sum(run.stage == "finished" for run in runs)
    return Group(table, Text(f"{count} of {len(runs) + len(waiting)} finished"))


def _course(run: Progress, width: int) -> str:
    points = run.course
    if not points:
        return "not measured yet"
    return f"{points[-1][1]:.3f}  {sparkline([value for _, value in points], width)}"


def _best(run: Progress) -> str:
    best = run.best
    return "" if best is None else f"  best {best[1]:.3f} in round {best[0]}"


def _clients(run: Progress) -> str:
    cells = [f"{run.metrics[-1]['clients']} answered"]
    for what, who in (("dropped", run.named("dropped")), ("away", run.away)):
        if who:
            cells.append(f"{len(who)} {what}{_who(who)}")
    return ", ".join(cells)


def _spent(run: Progress, epsilon: float) -> str:
    return f"{epsilon:.3f}" + ("" if run.budget is None else f" of {run.budget:g}")


def _bytes(run: Progress) -> str:
    said = f"{megabytes(run.total('bytes_down'))} down, {megabytes(run.total('bytes_up'))} up"
    root = run.total("root_bytes_down") + run.total("root_bytes_up")  # of a tree
    return f"{said}, {megabytes(root)} on the server's own links" if root else said


def _time(run: Progress) -> str:
    cells = [f"{_number(run.round_seconds, 1)} s a round"]
    if run.left is not None:
        cells.append(f"{clock(run.left)} left")
    if run.virtual_seconds is not None:
        cells.append(f"{run.virtual_seconds:.0f} virtual seconds")
    return ", ".join(cells)


def _waited(run: Progress) -> str:
    going = run.stage == "running" and run.done < run.rounds
    return f", round {run.done + 1} for {clock(run.waited)}" if going else ""


def _who(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f" ({', '.join(names[:NAMES])}{more})" if names else ""


def _more(count: int) -> list[Text]:
    return [Text(f"and {count} warnings more", style="yellow")] if count > 0 else []


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
