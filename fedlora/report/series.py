"""The lines of pictures: means of runs that differ in their seed alone, and final values by setting."""

import statistics
from collections.abc import Callable, Sequence

from fedlora.report.compare import clean, labels
from fedlora.report.draw import Line
from fedlora.report.read import Run, number
from fedlora.report.seeds import groups

Series = dict[float, tuple[float, float]]  # a step of a run, usually a round -> (x, y)


def by_round(name: str) -> Callable[[Run], Series]:
    """A function that gives a run's values of a metric by round."""
    return lambda run: {at: (at, value) for at, value in run.series(name)}


def means(runs: Sequence[Run], series: Callable[[Run], Series]) -> list[Line]:
    """A line for each group of runs that differ in their seed only."""
    together = groups(runs)
    named = labels([group[0] for group in together])
    drawn = [
        mean(name, [series(run) for run in group], at)
        for at, (group, name) in enumerate(zip(together, named, strict=True))
    ]
    return [line for line in drawn if line.points]


def mean(label: str, each: Sequence[Series], at: int) -> Line:
    """The mean of several runs at the steps that all have, with a band from the lowest to the highest."""
    each = [series for series in each if series]
    steps = sorted(set[float]().union(*each).intersection(*each)) if each else []
    xs = [statistics.fmean(series[step][0] for series in each) for step in steps]
    ys = [[series[step][1] for series in each] for step in steps]
    band = [(min(values), max(values)) for values in ys] if len(each) > 1 else []
    return Line(label, [*zip(xs, map(statistics.fmean, ys), strict=True)], band, at)


def ends(runs: Sequence[Run], metric: str, setting: str, x: Callable[[Run], float]) -> list[Line]:
    """The final metric against a setting: a line for each group of runs that differ in it and in seed only.

    Args:
        runs: the runs.
        metric: the key of the metric in the summaries.
        setting: the key in which the runs of a group may differ.
        x: gives the value of the setting in a run.

    Returns:
        The lines; none if no two runs of a group differ in the setting.
    """
    together = groups(runs, but=(setting,))
    if not any(len({x(run) for run in group}) > 1 for group in together):
        return []
    drawn = []
    for at, (group, label) in enumerate(
        zip(together, labels([min(g, key=x) for g in together]), strict=True)
    ):
        found: dict[float, list[float]] = {}
        for run in group:
            if (value := number(run.summary.get(metric))) is not None:
                found.setdefault(x(run), []).append(value)
        band = [(min(ys), max(ys)) for _, ys in sorted(found.items())]
        points = [(at_x, statistics.fmean(ys)) for at_x, ys in sorted(found.items())]
        drawn.append(Line(label, points, band if any(len(ys) > 1 for ys in found.values()) else (), at))
    return [line for line in drawn if line.points]


def without_privacy(runs: Sequence[Run], metric: str, drawn: Sequence[Line]) -> list[Line]:
    """Dashed horizontal lines: the final metric of the same strategies without privacy.

    A strategy whose runs differ in more than their seed gets no line.
    """
    found = []
    for line in drawn:
        alike = [run for run in runs if clean(run.strategy) == line.label]
        scores = [value for run in alike if (value := number(run.summary.get(metric))) is not None]
        if scores and len(groups(alike)) == 1:
            across = [(at, statistics.fmean(scores)) for at in (line.points[0][0], line.points[-1][0])]
            found.append(Line("", across, at=line.at, style="--"))
    return found
