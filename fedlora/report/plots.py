"""The pictures of the report. A function returns None if no run has values to draw.

Runs that differ in their seed alone are one line: their mean, in a band from the lowest to the highest.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fedlora.report.alarms import KEPT
from fedlora.report.clients import holdings, own_metric, own_values, thinned, worst_first
from fedlora.report.compare import clean, labels, words
from fedlora.report.draw import EXACT, Handle, Line, bars, hollow, key, lines
from fedlora.report.read import Run, evaluated, number
from fedlora.report.seeds import groups
from fedlora.report.series import Series, by_round, ends, mean, means, without_privacy

_LABELS = 6  # labels of the data with a colour of their own; the others are one part
_NAMED = 60  # the largest number of clients that a picture's alternative text lists
_BAND = "The band is from the lowest seed to the highest."


@dataclass(frozen=True)
class Picture:
    """A picture with its texts.

    Args:
        name: the name of its file, without an extension.
        figure: the matplotlib figure.
        caption: the text below it.
        description: its content in words and numbers, for readers who cannot see it.
    """

    name: str
    figure: Figure
    caption: str
    description: str


def results(runs: Sequence[Run]) -> list[Picture]:
    """The headline metric over rounds, virtual time, traffic, epsilon and rank, and the losses."""
    shown = []
    for metric in sorted({run.metric for run in runs}):
        each = [over_rounds, over_time, over_traffic, over_epsilon, over_rank]
        shown += [draw([run for run in runs if run.metric == metric], metric) for draw in each]
    return [picture for picture in [*shown, losses(runs)] if picture]


def aggregation(runs: Sequence[Run]) -> list[Picture]:
    """The aggregation error, the effective rank of ΔW and the kept share of its tail, over rounds."""
    captions = {
        "aggregation_error": "How far the server’s update is from the exact weighted sum of the clients’, "
        "relative to that sum.",
        "effective_rank": "How many directions carry ΔW, the mean over modules: exp of σ / Σσ’s entropy.",
        "tail_kept": "The share of ΔW beyond the clients’ smallest rank that a round keeps. Below 1 it "
        f"shrinks in every round; at {KEPT}, the dotted line, two thirds are gone after ten.",
    }
    bounds = {"tail_kept": KEPT}
    if exact(runs) is not None:
        captions.pop("aggregation_error")
    shown = [_simple(runs, name, words(name), captions[name], bounds.get(name)) for name in captions]
    return [picture for picture in shown if picture]


def exact(runs: Sequence[Run]) -> float | None:
    """The largest aggregation error if all are rounding errors, else None."""
    errors = [value for run in runs for _, value in run.series("aggregation_error")]
    return max(errors) if errors and max(errors) < EXACT else None


def over_rounds(runs: Sequence[Run], metric: str) -> Picture | None:
    """The headline metric after each round. Round 0 is before training."""
    where = f"on the {evaluated(runs)} after each round; round 0 is before training."
    caption = f"{words(metric).capitalize()} {where}"
    return _simple(runs, metric, words(metric), caption)


def over_time(runs: Sequence[Run], metric: str) -> Picture | None:
    """The headline metric against virtual time, for runs that have any."""

    def series(run: Run) -> Series:
        when = {0: 0.0} | dict(run.series("virtual_seconds"))
        return {at: (when[at], value) for at, value in run.series(metric) if at in when}

    said = f"{words(metric).capitalize()} against virtual time"
    caption = f"{said}, the seconds that simulated clients would have taken until then."
    drawn = means([run for run in runs if run.series("virtual_seconds")], series)
    return _picture(f"{metric}-over-time", drawn, "virtual seconds", words(metric), caption)


def over_traffic(runs: Sequence[Run], metric: str) -> Picture | None:
    """The headline metric against the megabytes that were sent until then, in both directions."""

    def series(run: Run) -> Series:
        each = [
            (number(row.get("bytes_down")) or 0) + (number(row.get("bytes_up")) or 0) for row in run.metrics
        ]
        until = itertools.accumulate([0.0, *each])
        sent = dict(zip([0, *(row["round"] for row in run.metrics)], until, strict=True))
        return {at: (sent[at] / 1e6, value) for at, value in run.series(metric)}

    caption = f"{words(metric).capitalize()} against all that was sent until then, to and from all clients."
    drawn = means(runs, series)
    return _picture(f"{metric}-over-traffic", drawn, "MB sent, down and up", words(metric), caption)


def over_epsilon(runs: Sequence[Run], metric: str) -> Picture | None:
    """The headline metric against epsilon: final values of runs that differ in epsilon, else by round."""
    private = [run for run in runs if number(run.summary.get("epsilon"))]
    drawn, x = ends(private, metric, "epsilon", allowed), "ε of the whole run, at most"
    free = without_privacy([run for run in runs if run not in private], metric, drawn)
    if not drawn:
        drawn, x = means(private, lambda run: _spent(run, metric)), "ε spent so far"
    caption = f"{words(metric).capitalize()} against ε, which is of the whole run and never of a round."
    more: list[tuple[Handle, str]] = [(key("--"), "without privacy")] if free else []
    return _picture(f"{metric}-over-epsilon", [*drawn, *free], x, words(metric), caption, more)


def over_rank(runs: Sequence[Run], metric: str) -> Picture | None:
    """The final headline metric against the clients' rank, for runs that differ in rank."""
    alike = ends([run for run in runs if len(_ranks(run)) == 1], metric, "ranks", mean_rank)
    order = {line.label: line.at for line in alike}
    mixed = []
    for group in groups([run for run in runs if len(_ranks(run)) > 1]):
        scores = [value for run in group if (value := number(run.summary.get(metric))) is not None]
        at = order.setdefault(clean(group[0].strategy), len(order))
        if scores:
            point = (mean_rank(group[0]), statistics.fmean(scores))
            mixed.append(Line(clean(group[0].strategy), [point], at=at, style=""))
    if len({x for line in [*alike, *mixed] for x, _ in line.points}) < 2:
        return None
    named = {line.label for line in alike}
    loose = [line for line in mixed if line.label not in named]
    joined = [Line("", line.points, at=line.at, style="") for line in mixed if line.label in named]
    caption = f"{words(metric).capitalize()} at the end against the clients’ rank, the mean over seeds."
    caption += " Hollow: clients of mixed ranks, at the mean of them." if mixed else ""
    more: list[tuple[Handle, str]] = [(hollow(), "mixed ranks")] if joined else []
    y = words(metric)
    return _picture(f"{metric}-over-rank", [*alike, *loose, *joined], "rank of the clients", y, caption, more)


def losses(runs: Sequence[Run]) -> Picture | None:
    """The evaluation loss after each round, and the clients' training loss, dashed."""
    tested = means(runs, by_round("loss"))
    trained = [
        Line(line.label, line.points, (), line.at, "--") for line in means(runs, by_round("train_loss"))
    ]
    caption = (
        f"Loss after each round, on the {evaluated(runs)}"
        if tested
        else "The clients’ training loss in each round"
    )
    more: list[tuple[Handle, str]] = []
    if tested and trained:
        caption += " and, dashed, in the clients’ training"
        more = [(key("-"), f"on {evaluated(runs)}"), (key("--"), "in training")]
    elif trained:
        trained = [Line(line.label, line.points, (), line.at) for line in trained]
    return _picture("loss-over-rounds", [*tested, *trained], "round", "loss", f"{caption}.", more)


def by_client(runs: Sequence[Run]) -> list[Picture]:
    """The clients' own metrics from the worst to the best; over seeds, the mean at each place."""
    together = groups(runs)
    named = [*zip(labels([group[0] for group in together]), together, strict=True)]
    shown = []
    for metric in sorted({metric for group in together if (metric := own_metric(group[0]))}):
        drawn = []
        for at, (label, group) in enumerate(named):
            each = [worst_first([*own_values(run).values()], metric) for run in group]
            if own_metric(group[0]) == metric and all(each):
                places = range(1, min(map(len, each)) + 1)
                series: list[Series] = [
                    {place: (place, values[place - 1]) for place in places} for values in each
                ]
                drawn.append(mean(label, series, at))
        y = "training loss" if metric == "loss" else words(metric)
        rows = "when each last took part" if metric == "loss" else "on the rows that each keeps back"
        caption = f"The clients’ {y}, {rows}, from the worst to the best."
        name = f"clients-{metric}".replace("_", "-")
        shown.append(_picture(name, drawn, "client, by place", y, caption))
    return [picture for picture in shown if picture]


def data(run: Run, name: str = "clients") -> Picture | None:
    """The number of rows of each client, by label if the labels are known."""
    held, thin = thinned(holdings(run))
    if not held or any(row.get("rows") is None for row in held.values()):
        return None
    known = all("labels" in row for row in held.values())  # sites report their number of rows only
    named = [clean(label) for label in run.data.get("labels") or []] if known else []
    counts = {label: [row["labels"][at] for row in held.values()] for at, label in enumerate(named)}
    order = sorted(counts, key=lambda label: -sum(counts[label]))
    parts = {label: counts[label] for label in order[:_LABELS]}
    if rest := order[_LABELS:]:
        parts[f"{len(rest)} more"] = [sum(column) for column in zip(*(counts[r] for r in rest), strict=True)]
    parts = parts or {"rows": [row["rows"] for row in held.values()]}
    ranks = len({row["rank"] for row in held.values()}) > 1
    names = [str(row["name"]) for row in held.values()]
    if names == [f"client-{at}" for at in held]:
        names = [str(at) for at in held]
    ticks = [f"{n}\n{row['rank']}" for n, row in zip(names, held.values(), strict=True)] if ranks else names
    caption = f"Rows of each client{', by label' if named else ''}.{thin}"
    rows = [row["rows"] for row in held.values()]
    description = "; ".join(f"{n}: {count}" for n, count in zip(names, rows, strict=True))
    if len(names) > _NAMED:
        description = f"{len(names)} clients of {min(rows)} to {max(rows)} rows."
    x = "client and its rank" if ranks else "client"
    return Picture(name, bars(ticks, parts, x, "rows"), caption, description)


def allowed(run: Run) -> float:
    """The epsilon budget of a run."""
    ledger = run.summary.get("ledger")
    budget = number(ledger.get("budget")) if isinstance(ledger, dict) else None
    return budget or number(run.summary.get("epsilon")) or 0.0


def mean_rank(run: Run) -> float:
    """The mean of the clients' ranks."""
    return statistics.fmean([row["rank"] for row in holdings(run).values()] or _ranks(run) or [0])


def _ranks(run: Run) -> list[int]:
    return [*(run.summary.get("ranks") or [])]


def _spent(run: Run, metric: str) -> Series:
    measured = dict(run.series(metric))
    return {at: (spent, measured[at]) for at, spent in run.series("epsilon") if at in measured}


def _simple(
    runs: Sequence[Run], name: str, y: str, caption: str, bound: float | None = None
) -> Picture | None:
    return _picture(
        f"{name}-over-rounds".replace("_", "-"),
        means(runs, by_round(name)),
        "round",
        y,
        caption,
        bound=bound,
    )


def _picture(
    name: str,
    drawn: Sequence[Line],
    x: str,
    y: str,
    caption: str,
    more: Sequence[tuple[Handle, str]] = (),
    bound: float | None = None,
) -> Picture | None:
    if not any(line.points for line in drawn):
        return None
    if any(line.band for line in drawn):
        caption = f"{caption} {_BAND}"
    description = " ".join(_described(line, x) for line in drawn)
    return Picture(name, lines(drawn, x, y, more, bound), caption, description)


def _described(line: Line, x: str) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    at = "in round" if x == "round" else "at"
    name = f"{line.label}{' in training' if line.style == '--' else ''}: " if line.label else ""
    return f"{name}{start:.3g} {at} {first:.3g}, {end:.3g} {at} {last:.3g}."
