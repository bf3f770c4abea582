"""Runs that differ in their seed alone, combined into one row: means with 95 % intervals."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.special import stdtrit

from fedlora.report.compare import ABSENT, labels, words
from fedlora.report.read import Run, number
from fedlora.report.tables import Table, amounts, megabytes, score, setting

INTERVAL = "Mean ± 95 % interval over seeds (Student’s t)"
_NOT_SETTINGS = ("seed", "out", "resume")


def groups(runs: Sequence[Run], but: Sequence[str] = ()) -> list[list[Run]]:
    """Group the runs that differ in seed and folder only, in the order of the first run of each group.

    A repetition with the same seed is a group of its own, because it is no independent sample.

    Args:
        runs: the runs to group.
        but: further keys in which the runs of a group may differ, at any depth of the configuration.
    """
    found: dict[tuple[str, int], list[Run]] = {}
    times = Counter[tuple[str, str]]()
    for run in runs:
        settings = _key(_settings(run.config, (*_NOT_SETTINGS, *but)))
        same = (settings, _key(_settings(run.config, ("out", "resume"))))
        found.setdefault((settings, times[same]), []).append(run)
        times[same] += 1
    return list(found.values())


def interval(values: Iterable[object]) -> tuple[float, float | None] | None:
    """The mean of the numbers and the half-width of its 95 % interval, None for one number; None for none."""
    found = [value for item in values if (value := number(item)) is not None]
    if not found:
        return None
    if len(found) < 2:
        return found[0], None
    reach = float(stdtrit(len(found) - 1, 0.975)) * statistics.stdev(found) / math.sqrt(len(found))
    return statistics.fmean(found), reach


def spread(values: Iterable[object], metric: str) -> str:
    """The mean and its interval as the text of a cell."""
    found = interval(values)
    if found is None:
        return ABSENT
    mean, reach = found
    return score(mean, metric) + (f" ± {score(reach, metric)}" if reach is not None else "")


def seeds_table(runs: Sequence[Run]) -> Table | None:
    """A row for each group of runs that differ in their seed only; None if no group has two runs.

    Values are means over the group: bytes and seconds of a whole run, the aggregation error of the last
    round, and the effective rank after the first and after the last round.
    """
    together = groups(runs)
    if max(map(len, together)) < 2:
        return None
    columns: dict[str, list[str]] = {"runs": labels([group[0] for group in together])}
    columns["ranks"] = [setting(group[0].summary.get("ranks")) for group in together]
    columns["seeds"] = [str(len(group)) for group in together]
    metrics = dict.fromkeys([*(run.metric for run in runs), "loss"])
    for metric in metrics:
        columns[words(metric)] = [
            spread((run.summary.get(metric) for run in group), metric) for group in together
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
        _small(_mean(_end(run, "aggregation_error", -1) for run in group)) for group in together
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
    return Table(
        "Over seeds", [*shown], [list(row) for row in zip(*shown.values(), strict=True)], f"{INTERVAL}."
    )


def _key(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _settings(config: Any, without: Sequence[str]) -> Any:
    """A configuration without some keys, at any depth, because groups repeat keys such as the seed."""
    if not isinstance(config, dict):
        return config
    return {key: _settings(value, without) for key, value in config.items() if key not in without}


def _end(run: Run, key: str, at: int) -> float | None:
    values = [value for round, value in run.series(key) if round]
    return values[at] if values else None


def _mean(values: Iterable[object]) -> float | None:
    found = interval(values)
    return found and found[0]


def _small(value: float | None) -> str:
    """An error with three decimals, or in scientific notation if these would be zeros."""
    return f"{value:.0e}" if value and value < 5e-4 else score(value, "loss")
