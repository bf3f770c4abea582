"""A finished run in a notebook: the last rounds in a table, and the headline metric as a curve."""

import base64
import io

from matplotlib.figure import Figure

from fedlora.report.page import render
from fedlora.report.read import Run, number

SHOWN = 10  # rounds of the table
COLUMNS = (
    "round",
    "loss",
    "{metric}",
    "train_loss",
    "epsilon",
    "bytes_down",
    "bytes_up",
    "clients",
    "seconds",
)


def notebook_html(run: Run, title: str) -> str:
    """The table and the curve as HTML, with the picture inside.

    Args:
        run: a finished run.
        title: what to call it.
    """
    names = [name.format(metric=run.metric) for name in COLUMNS]
    lines = run.metrics[-SHOWN:]
    names = [name for name in names if any(number(line.get(name)) is not None for line in lines)]
    return render(
        "notebook.html.j2",
        title=title,
        names=names,
        rows=[[_cell(number(line.get(name))) for name in names] for line in lines],
        metric=run.metric,
        curve=_curve(run),
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int(value) else f"{value:.3f}"


def _curve(run: Run) -> str:
    """A PNG of the curve as base64; nothing where there are fewer than two points."""
    points = run.series(run.metric)
    if len(points) < 2:
        return ""
    figure = Figure(figsize=(5, 2.6))
    axes = figure.subplots()
    axes.plot([at for at, _ in points], [value for _, value in points], marker="o")
    axes.set_xlabel("round")
    axes.set_ylabel(run.metric.replace("_", " "))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight", dpi=110)
    return base64.b64encode(picture.getvalue()).decode()
