"""The page's title, and one sentence on what was reached."""

from collections.abc import Sequence

from fedlora.report.clients import absences
from fedlora.report.compare import clean, labels, words
from fedlora.report.read import Run, number
from fedlora.report.seeds import groups, interval, spread
from fedlora.report.tables import megabytes, score


def title(runs: Sequence[Run]) -> str:
    """The single run's name, or how many runs there are, and their data where they share it."""
    name = labels(runs)[0] if len(runs) == 1 else f"{len(runs)} runs"
    data = {clean(run.summary.get("data")) for run in runs}
    return f"{name} on {data.pop()}" if len(data) == 1 else name


def result(runs: Sequence[Run]) -> str:
    """One sentence: what a single run reached, or which of several comparable settings did best."""
    together = groups(runs)
    names = labels([group[0] for group in together])
    metric = runs[0].metric
    if len(runs) == 1:
        away = absences(runs[0])
        return _reached(runs[0], names[0]) + (f" Away: {away}." if away else "")
    alike = {(run.metric, run.summary.get("data"), run.summary.get("model")) for run in runs}
    final = [interval(run.summary.get(metric) for run in group) for group in together]
    measured = [found[0] for found in final if found is not None]
    if len(alike) > 1 or any(number(run.summary.get(metric)) is None for run in runs):
        return (
            "The runs differ in model, data or metric, or were not all measured, so none is called the best."
        )
    top = (max if runs[0].more_is_better else min)(measured)
    winners = [at for at, value in enumerate(measured) if value == top]
    others = [names[at] for at in winners[1:4]] + ([f"{len(winners) - 4} more"] if winners[4:] else [])
    level = f" (level with {', '.join(others)})" if others else ""
    best, name = together[winners[0]], names[winners[0]]
    if len(best) == 1 == max(map(len, together)):
        return f"Best of {len(runs)}: {_reached(best[0], name)[:-1]}{level}."
    mean = f"{words(metric)} {spread((run.summary.get(metric) for run in best), metric)}"
    of = f"Best mean of {len(together)}: " if len(together) > 1 else ""
    return f"{of}{name} reached {mean} on {clean(best[0].summary.get('data'))} over {len(best)} seeds{level}."


def _reached(run: Run, name: str) -> str:
    metric, summary = run.metric, run.summary
    rounds = f"{summary.get('rounds')} round{'' if summary.get('rounds') == 1 else 's'}"
    sent = f"{megabytes([(summary.get('bytes_down') or 0) + (summary.get('bytes_up') or 0)])[0]} MB sent"
    data = clean(summary.get("data"))
    if number(summary.get(metric)) is None:
        return f"{name} finished {rounds} on {data} without a measured {words(metric)}, {sent}."
    before = (summary.get("initial") or {}).get(metric)
    start = f" ({score(before, metric)} before training)" if number(before) is not None else ""
    return f"{name} reached {_value(summary[metric], metric)} on {data} after {rounds}{start}, {sent}."


def _value(value: object, metric: str) -> str:
    """0.900 accuracy, but perplexity 12.34."""
    shown = score(value, metric)
    return f"{shown} {words(metric)}" if "accuracy" in metric else f"{words(metric)} {shown}"
