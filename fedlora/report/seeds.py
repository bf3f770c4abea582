"""Runs that differ in their seed alone, as one row each: mean and standard deviation."""

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from fedlora.report.compare import ABSENT, labels, words
from fedlora.report.read import Run, number
from fedlora.report.tables import Table, amounts, megabytes, score

_NOT_SETTINGS = ("seed", "out", "resume")


def groups(runs: Sequence[Run], but: Sequence[str] = ()) -> list[list[Run]]:
    """The runs, those together that differ in seed and folder alone, in the order of the first of each.

    Args:
        runs: any.
        but: further keys in which those of a group may differ, whatever group they are of.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        settings = _settings(run.config, (*_NOT_SETTINGS, *but))
        found.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    return list(found.values())


def seeds_table(runs: Sequence[Run]) -> Table | None:
    """One row for all runs that differ in their seed alone; None where no two do.

    The deviation is the sample's (n - 1). Bytes and seconds are means of a whole run; the aggregation error
    is the mean of the last round's, the effective rank that after the first round and after the last.
    """
    together = groups(runs)
    if max(map(len, together)) < 2:
        return None
    metrics = list(dict.fromkeys(run.metric for run in runs))
    columns: dict[str, list[str]] = {"runs": labels([group[0] for group in together])}
    columns["ranks"] = [", ".join(map(str, group[0].summary.get("ranks") or [])) for group in together]
    columns["seeds"] = [str(len(group)) for group in together]
    for metric in metrics:
        columns[words(metric)] = [
            _spread([run.summary.get(metric) for run in group], metric) for group in together
        ]
    columns["ε"] = amounts([_mean(run.summary.get("epsilon") for run in group) for group in together])
    for way in ("down", "up"):
        columns[f"MB {way}"] = megabytes(
            [_mean(run.summary.get(f"bytes_{way}") for run in group) for group in together]
        )
    columns["seconds"] = amounts(
        [_mean(run.summary.get("wall_seconds") for run in group) for group in together]
    )
    columns["aggregation error"] = [
        score(_mean(_end(run, "aggregation_error", -1) for run in group), "loss") for group in together
    ]
    columns["effective rank"] = [
        " → ".join(
            score(_mean(_end(run, "effective_rank", at) for run in group), "perplexity") for at in (0, -1)
        )
        for group in together
    ]
    shown = {
        name: cells for name, cells in columns.items() if set(cells) - {ABSENT, "", f"{ABSENT} → {ABSENT}"}
    }
    note = "Mean ± standard deviation over seeds."
    return Table("Over seeds", [*shown], [list(row) for row in zip(*shown.values(), strict=True)], note)


def _settings(config: Any, without: Sequence[str]) -> Any:
    """A configuration without some keys, the seed among them, which several groups take over."""
    if not isinstance(config, dict):
        return config
    return {key: _settings(value, without) for key, value in config.items() if key not in without}


def _end(run: Run, key: str, at: int) -> float | None:
    values = [value for round, value in run.series(key) if round]
    return values[at] if values else None


def _mean(values: Iterable[object]) -> float | None:
    found = [value for item in values if (value := number(item)) is not None]
    return statistics.fmean(found) if found else None


def _spread(values: Sequence[object], metric: str) -> str:
    found = [value for item in values if (value := number(item)) is not None]
    if not found:
        return ABSENT
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return score(statistics.fmean(found), metric) + (
        f" ± {score(deviation, metric)}" if len(found) > 1 else ""
    )
