"""The report's pictures, as SVG bytes; each is None when no run has anything to draw.

Drawn on Figure objects, so no window system and no pyplot state is involved. Colours are those of Okabe and
Ito, which stay apart for colour-blind readers; markers tell the runs apart in black and white. Text
stays text, drawn by the reader's own fonts, so that names in any script are readable.
"""

import io
import itertools
import statistics
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedlora.report.compare import labels, words
from fedlora.report.read import Run, number
from fedlora.report.seeds import groups

Series = list[tuple[float, float]]

_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT, _LEGEND_ROW = 4.8, 3.0, 0.185  # inches
_EXACT = 1e-6  # aggregation errors below this are rounding
_STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlora",  # the same runs give the same bytes
}


def metric_over_rounds(runs: Sequence[Run], metric: str) -> bytes | None:
    """The headline metric after each round; round 0 is before training."""
    return _draw(runs, [[*run.series(metric)] for run in runs], "round", words(metric))


def loss_over_rounds(runs: Sequence[Run]) -> bytes | None:
    """The evaluation loss after each round, and the clients' training loss, dashed."""
    return _draw(
        runs,
        [[*run.series("loss")] for run in runs],
        "round",
        "loss",
        [[*run.series("train_loss")] for run in runs],
    )


def metric_over_traffic(runs: Sequence[Run], metric: str) -> bytes | None:
    """The headline metric against the megabytes that have travelled, both ways, until then."""
    lines: list[Series] = []
    for run in runs:
        each = [
            (number(row.get("bytes_down")) or 0) + (number(row.get("bytes_up")) or 0) for row in run.metrics
        ]
        sent = dict(
            zip([0, *(row["round"] for row in run.metrics)], itertools.accumulate([0.0, *each]), strict=True)
        )
        lines.append([(sent[at] / 1e6, value) for at, value in run.series(metric)])
    return _draw(runs, lines, "MB sent, down and up", words(metric))


def error_over_rounds(runs: Sequence[Run]) -> bytes | None:
    """How far each round's aggregate was from the exact weighted sum of the clients' updates."""
    return _draw(runs, [[*run.series("aggregation_error")] for run in runs], "round", "aggregation error")


def metric_over_epsilon(runs: Sequence[Run], metric: str) -> bytes | None:
    """The headline metric against epsilon: at the end of runs that differ in it, else round by round.

    Runs that differ in nothing but epsilon and seed are one line, a point an epsilon, the mean over seeds.
    """
    private = [run for run in runs if number(run.summary.get("epsilon")) and run.metric == metric]
    together = groups(private, but=("epsilon",))
    if not any(len({_epsilon(run) for run in group}) > 1 for group in together):
        lines = [_spent(run, metric) for run in private]
        return _draw(private, lines, "ε spent so far", words(metric))
    lines = []
    for group in together:
        found: dict[float, list[float]] = {}
        for run in group:
            if (value := number(run.summary.get(metric))) is not None:
                found.setdefault(_epsilon(run), []).append(value)
        lines.append([(at, statistics.fmean(values)) for at, values in sorted(found.items())])
    firsts = [min(group, key=_epsilon) for group in together]
    return _draw(firsts, lines, "ε of the whole run, at most", words(metric))


def _epsilon(run: Run) -> float:
    """What a run was allowed to spend."""
    ledger = run.summary.get("ledger")
    allowed = number(ledger.get("budget")) if isinstance(ledger, dict) else None
    return allowed or number(run.summary.get("epsilon")) or 0.0


def _spent(run: Run, metric: str) -> Series:
    measured = dict(run.series(metric))
    return [(at, measured[round]) for round, at in run.series("epsilon") if round in measured]


def _draw(
    runs: Sequence[Run], lines: list[Series], x: str, y: str, dashed: list[Series] | None = None
) -> bytes | None:
    if not any(lines) and not any(dashed or []):
        return None
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # measured here, drawn by the reader
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
        handles = [_line(axes, at, line, "-") for at, line in enumerate(lines)]
        for at, line in enumerate(dashed or []):
            _line(axes, at, line, "--")
        if x == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        _scale(axes, [value for line in [*lines, *(dashed or [])] for _, value in line])
        named = [*zip(handles, labels(runs), strict=True)] if len(runs) > 1 else []
        if any(dashed or []):
            named += [(_key("-"), "on test rows"), (_key("--"), "in training")]
        _legend(figure, named)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    return picture.getvalue()


def _line(axes: Axes, at: int, line: Series, style: str) -> Line2D:
    drawn = axes.plot(
        [x for x, _ in line],
        [y for _, y in line],
        style,
        color=_COLOURS[at % len(_COLOURS)],
        marker=_MARKERS[at % len(_MARKERS)] if style == "-" else None,
        clip_on=False,
        markevery=max(1, len(line) // 12),
    )
    return drawn[0]


def _key(style: Literal["-", "--"]) -> Line2D:
    return Line2D([], [], color="#777777", linestyle=style)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Start at zero where that wastes no space; logarithmic where values span over two decades."""
    low, high = min(values), max(values)
    if 100 * low < high and low >= 0:
        axes.set_yscale("symlog", linthresh=max(_EXACT, low))
    if 0 <= low < high / 2:
        axes.set_ylim(bottom=0)


def _legend(figure: Figure, named: Sequence[tuple[Line2D, str]]) -> None:
    if not named:
        return
    columns = max(1, min(3, 60 // (6 + max(len(name) for _, name in named))))
    rows = -(-len(named) // columns)
    figure.set_size_inches(_WIDTH, _HEIGHT + _LEGEND_ROW * rows)  # the axes keep their size
    handles = [handle for handle, _ in named]
    legend = figure.legend(
        handles, ["run"] * len(named), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    for text, (_, name) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)  # a folder may be called $x$
        text.set_text(name)
