"""The drawing of pictures: lines with bands, points and bars, as SVG for the page and as PNG for papers.

It uses Figure objects, so that neither a window system nor the state of pyplot is needed. The colours are
those of Okabe and Ito and two of Tol, which colour-blind readers can distinguish; markers distinguish lines
in black and white. Text in an SVG stays text and is drawn with the reader's fonts, so names in any script are
readable.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

Handle = Line2D | Patch

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933"]
_MARKERS = "osD^vPX*"
_GREY, _REST = "#777777", "#bbbbbb"
_WIDTH, _HEIGHT, _LEGEND_ROW = 4.8, 2.4, 0.185  # inches of a picture, of its axes, of a row of the legend
_UPRIGHT, _UPRIGHT_LETTER = 20, 0.065  # of a vertical name: most letters, and inches of each
_TICK_LETTER, _TICK_LINE = 0.075, 0.15  # inches of a letter and of a line of the numbers at an axis
_NAME_OF_AXIS, _GAP = 0.22, 0.1  # inches of an axis's name, and between what stands beside it
EXACT = 1e-6  # aggregation errors below this are rounding errors
_STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlora",  # so that the same runs give the same bytes
}


@dataclass(frozen=True)
class Line:
    """A line of a picture: the values of one run, or the mean of several.

    Args:
        label: the name in the legend.
        points: (x, y), ordered by x.
        band: the lowest and the highest y at every x, for several runs.
        at: the index of the colour and the marker; lines that belong together share it.
        style: solid, dashed, or points only.
    """

    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    at: int = 0
    style: Literal["-", "--", ""] = "-"


def lines(
    drawn: Sequence[Line],
    x: str,
    y: str,
    more: Sequence[tuple[Handle, str]] = (),
    bound: float | None = None,
) -> Figure:
    """A picture of lines.

    Args:
        drawn: the lines, each with points; a legend names them if their labels differ.
        x: the name of the x axis; an axis of rounds, clients or ranks has whole numbers.
        y: the name of the y axis, which starts at zero if that does not waste space.
        more: further entries of the legend.
        bound: the height of a dotted line; None draws none.
    """
    with matplotlib.rc_context(_STYLE), _quiet():
        figure, axes = _empty(x, y)
        banded = sum(bool(line.band) for line in drawn)
        each = [(line, _line(axes, line, 0.16 if banded < 4 else 0.5 / banded)) for line in drawn]
        handles = {line.label: made for line, made in each if line.style != "--"}
        if x.startswith(("round", "client")):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if x.startswith("rank"):
            _doubling(axes, [at for line in drawn for at, _ in line.points])
        if bound is not None:
            axes.axhline(bound, color=_GREY, linestyle=":", linewidth=1.2)
        _scale(axes, [value for line in drawn for _, value in [*line.points, *line.band]], y)
        named: list[tuple[Handle, str]] = [(handle, label) for label, handle in handles.items() if label]
        _place(figure, axes, _legend(figure, [*(named if len(handles) > 1 else []), *more]))
    return figure


def bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], x: str, y: str) -> Figure:
    """Stacked bars with a colour for each part; the last part is grey if there are more than colours."""
    with matplotlib.rc_context(_STYLE), _quiet():
        figure, axes = _empty(x, y)
        axes.grid(False, axis="x")
        axes.use_sticky_edges = False
        axes.margins(y=0.04)
        floor, handles = [0.0] * len(names), []
        for at, heights in enumerate(parts.values()):
            colour = COLOURS[at] if at < len(COLOURS) - 1 else _REST
            shown = axes.bar(
                range(len(names)),
                heights,
                0.8 if len(names) < 60 else 1.0,
                bottom=floor,
                color=colour,
                edgecolor="white",
                linewidth=0.4 if len(names) < 60 else 0,
                hatch=["", "///", "...", "xxx", "\\\\\\", "ooo", ""][at % 7],
            )
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
            handles.append(shown[0])
        room = len("".join(names)) <= 90 and len(names) <= 32
        turned = not room and len(names) <= 40
        names = [_turned(name) for name in names] if turned else names
        axes.set_xticks(range(len(names)) if room or turned else [], names if room or turned else [])
        if turned:
            axes.tick_params(axis="x", rotation=90, labelsize=8)
        for tick in axes.get_xticklabels():
            tick.set_parse_math(False)
        axes.set_ylim(bottom=0)
        below = _legend(figure, [*zip(handles, parts, strict=True)] if len(parts) > 1 else [])
        _place(figure, axes, below, _UPRIGHT_LETTER * max(map(len, names)) if turned else None)
    return figure


def _turned(name: str) -> str:
    """A client's name and rank on one line, short enough for a vertical label."""
    name, _, rank = name.partition("\n")
    short = name if len(name) <= _UPRIGHT else f"{name[: _UPRIGHT - 1]}…"
    return f"{short} r{rank}" if rank else short


def svg(figure: Figure) -> bytes:
    """The picture as SVG with a transparent background."""
    return _saved(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def png(figure: Figure) -> bytes:
    """The picture as PNG with 200 pixels an inch, on white."""
    return _saved(figure, format="png", dpi=200, facecolor="white", metadata={"Software": None})


def key(style: Literal["-", "--"]) -> Line2D:
    """The symbol of a line style in the legend."""
    return Line2D([], [], color=_GREY, linestyle=style)


def hollow() -> Line2D:
    """The symbol of points without a line in the legend."""
    return Line2D([], [], color=_GREY, linestyle="", marker="o", markerfacecolor="none")


def _saved(figure: Figure, **how: Any) -> bytes:
    picture = io.BytesIO()
    with matplotlib.rc_context(_STYLE), _quiet():
        figure.savefig(picture, **how)
    return picture.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings about missing glyphs: an SVG is drawn with the reader's fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _empty(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure()
    return figure, figure.add_subplot(xlabel=x, ylabel=y)


def _line(axes: Axes, line: Line, shade: float) -> Line2D:
    colour = COLOURS[line.at % len(COLOURS)]
    marker = _MARKERS[line.at % len(_MARKERS)]
    xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
    if line.band:
        axes.fill_between(
            xs,
            [low for low, _ in line.band],
            [high for _, high in line.band],
            color=colour,
            alpha=shade,
            lw=0,
        )
    drawn = axes.plot(
        xs,
        ys,
        line.style or "none",
        color=colour,
        marker=None if line.style == "--" else marker,
        markerfacecolor="none" if line.style == "" else colour,
        clip_on=False,
        markevery=max(1, len(xs) // 12),
    )
    return drawn[0]


def _doubling(axes: Axes, ranks: Sequence[float]) -> None:
    """A logarithmic x axis, with ticks at powers of two."""
    axes.set_xscale("log", base=2)
    low, high = min(ranks), max(ranks)
    ticks = [2.0**k for k in range(12) if low / 1.5 <= 2**k <= high * 1.5]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _scale(axes: Axes, values: Sequence[float], y: str) -> None:
    """Start the y axis at zero if that wastes no space; logarithmic if errors or losses span two decades."""
    low, high = min(values), max(values)
    if 100 * low < high and low >= 0 and "accuracy" not in y:
        axes.set_yscale("symlog", linthresh=max(EXACT, low))
    if 0 <= low < high / 2:
        axes.set_ylim(bottom=0)


def _place(figure: Figure, axes: Axes, legend: float, names: float | None = None) -> None:
    """Leave room around the axes for what stands there.

    Matplotlib's own layouts draw every picture twice more to measure it, and most of a report's time is that.

    Args:
        figure: the picture.
        axes: its axes, with all that is drawn in them.
        legend: inches of the legend at the bottom.
        names: inches of the names below the x axis; None where those stand upright.
    """
    said = {
        axis: axis.get_major_formatter().format_ticks(axis.get_majorticklocs().tolist())
        for axis in (axes.xaxis, axes.yaxis)
    }
    if names is None:
        names = _TICK_LINE * max((text.count("\n") + 1 for text in said[axes.xaxis]), default=0)
    widest = max((len(_plain(text)) for text in said[axes.yaxis]), default=0)
    left, right = _NAME_OF_AXIS + _TICK_LETTER * widest + 2 * _GAP, 1.5 * _GAP
    bottom = legend + _NAME_OF_AXIS + names + 1.5 * _GAP
    width, height = _WIDTH, _HEIGHT + bottom + _GAP  # so that the axes keep their size
    figure.set_size_inches(width, height)
    sides = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height}
    figure.subplots_adjust(**sides, top=1 - _GAP / height)


def _plain(text: str) -> str:
    """What is seen of a number that may be set in TeX, such as 10 to a power."""
    return re.sub(r"\\[a-z]+|[${}^]", "", text)


def _legend(figure: Figure, named: Sequence[tuple[Handle, str]]) -> float:
    """Name what is drawn below the axes; returns how many inches that takes."""
    if not named:
        return 0.0
    columns = max(1, min(3, 60 // (6 + max(len(name) for _, name in named))))
    rows = -(-len(named) // columns)
    handles = [handle for handle, _ in named]
    labels, look = ["run"] * len(named), {"frameon": False, "borderaxespad": 0.2, "fontsize": 9}
    legend = figure.legend(handles, labels, loc="lower center", ncols=columns, **look)
    for text, (_, name) in zip(legend.get_texts(), named, strict=True):
        text.set_parse_math(False)  # a folder may be called $x$
        text.set_text(name)
    return _LEGEND_ROW * rows
