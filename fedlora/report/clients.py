"""Tables about the clients of runs: ranks, rows, own metrics, fairness, and whose updates were left out."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.report.compare import ABSENT, clean, labels, words
from fedlora.report.read import Run, evaluated, number
from fedlora.report.seeds import INTERVAL, groups, spread
from fedlora.report.tables import Table, amounts, megabytes, score, turned

_MOST = 40  # rows in the table of left-out clients; the CSV file has all
_DRAWN = 200  # the largest number of clients that a picture shows individually


def clients_table(run: Run) -> Table:
    """The clients of the last round; clients whose updates were not aggregated are marked."""
    last = max((row["round"] for row in run.clients), default=0)
    rows = sorted((row for row in run.clients if row["round"] == last), key=lambda row: row["client"])
    columns = {
        "client": [_name(row) for row in rows],
        "rank": [_whole(row.get("rank")) for row in rows],
        "examples": [_whole(row.get("examples")) if run.counts else ABSENT for row in rows],
        "steps": [_whole(row.get("steps")) for row in rows],
        "ε": amounts([row.get("epsilon") for row in rows]),
        "σ": amounts([row.get("sigma") for row in rows]),
        "clipped": [score(row.get("clipped"), "loss") for row in rows],
        "training loss": [score(row.get("loss"), "loss") for row in rows],
        f"alone on {evaluated([run])}": [score(row.get("test_accuracy"), "accuracy") for row in rows],
        words(run.local_metric): [score(row.get(run.local_metric), "accuracy") for row in rows],
        "MB down": megabytes([row.get("bytes_down") for row in rows]),
        "MB up": megabytes([row.get("bytes_up") for row in rows]),
        "status": [_status(row) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    marked = frozenset(at for at, row in enumerate(rows) if _left_out(row))
    return Table(f"Clients in round {last}", [*shown], turned(shown), marked=marked)


def left_out_table(runs: Sequence[Run]) -> Table | None:
    """Clients whose updates were left out, with numbers of rounds and last reasons; None without any."""
    rows = []
    for label, run in zip(labels(runs), runs, strict=True):
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in run.clients:
            if kind := _left_out(row):
                found.setdefault((_name(row), kind), []).append(row)
        for (name, kind), lines in found.items():
            rounds = sorted({line["round"] for line in lines})
            span = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]}–{rounds[-1]}"
            why = clean(lines[-1].get("rejected") or lines[-1].get("reason") or ABSENT)
            rows.append([label, name, kind, str(len(rounds)), span, why])
    if not rows:
        return None
    header = ["run", "client", "was", "rounds", "from–to", "reason, the last time"]
    if len(runs) == 1:
        header, rows = header[1:], [row[1:] for row in rows]
    note = f"{_MOST} of {len(rows)}; clients.csv has all." if len(rows) > _MOST else ""
    return Table("Left out", header, rows[:_MOST], note)


def absences(run: Run) -> str:
    """Sites that were away and in how many rounds, such as "south in 3 of 4 rounds"; empty if none was."""
    away = run.summary.get("away")
    if not isinstance(away, dict) or not away:
        return ""
    by_reason = ", ".join(f"{clean(name)} in {count}" for name, count in away.items())
    return f"{by_reason} of {run.summary.get('rounds')} rounds"


def ranks_table(run: Run) -> Table | None:
    """The number of clients with each rank, and their rows where these are public; None without clients."""
    held = holdings(run)
    if not held:
        return None
    columns: dict[str, list[str]] = {"rank": [], "clients": [], "rows": [], "rows a client": []}
    for rank in sorted({row["rank"] for row in held.values()}):
        rows = [row.get("rows") for row in held.values() if row["rank"] == rank]
        known = [int(count) for count in rows if count is not None]
        columns["rank"].append(str(rank))
        columns["clients"].append(str(len(rows)))
        columns["rows"].append(f"{sum(known):,}" if len(known) == len(rows) else ABSENT)
        span = (
            f"{min(known)}–{max(known)}"
            if known and min(known) < max(known)
            else str(max(known, default=ABSENT))
        )
        columns["rows a client"].append(span)
    shown = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    return Table("Ranks and rows", [*shown], turned(shown))


def holdings(run: Run) -> dict[int, dict[str, Any]]:
    """Client id -> name, rank and, if known, `rows` and `labels`, from data.json or clients.jsonl."""
    found: dict[int, dict[str, Any]] = {}
    for row in run.clients:
        before = found.get(row["client"], {}).get("rows")
        rows = row.get("examples") if run.counts and row.get("status") == "ok" else before
        found[row["client"]] = {"name": _name(row), "rank": row.get("rank") or 0, "rows": rows}
    for row in run.data.get("clients") or []:
        found[row["client"]] = {**row, "name": clean(row.get("name") or row["client"])}
    return dict(sorted(found.items()))


def thinned(held: Mapping[int, dict[str, Any]]) -> tuple[Mapping[int, dict[str, Any]], str]:
    """At most a few hundred of the clients, and a sentence about which; all of them if they are few."""
    if (step := math.ceil(len(held) / _DRAWN)) <= 1:
        return held, ""
    order = sorted(held, key=lambda at: held[at]["rows"] or 0)
    which = f" One in {step} of {len(held)}, in the order of their rows."
    return {at: held[at] for at in order[::step]}, which


def own_metric(run: Run) -> str | None:
    """The metric of single clients: on their held-out rows, else the training loss, else None."""
    if any(run.local_metric in row for row in run.clients) or _own(run):
        return run.local_metric
    return "loss" if any(number(row.get("loss")) is not None for row in run.clients) else None


def own_values(run: Run) -> dict[str, float]:
    """Client name -> its own metric, as last measured."""
    metric, names, found = own_metric(run), {}, {}
    for row in run.clients:
        names[str(row["client"])] = _name(row)
        if metric and (value := number(row.get(metric))) is not None:
            found[str(row["client"])] = value
    if metric == run.local_metric:
        own = {client: number(row.get(metric)) for client, row in _own(run).items()}
        found |= {client: value for client, value in own.items() if value is not None}
    return {names.get(client, clean(client)): value for client, value in found.items()}


def worst_first(values: Sequence[float], metric: str) -> list[float]:
    """The clients' values in order, the worst first: the lowest accuracy or the highest loss."""
    return sorted(values, reverse=not metric.endswith("accuracy"))


def fairness_table(runs: Sequence[Run]) -> Table | None:
    """Mean, spread and worst decile of the clients' own metrics; None if no client has any."""
    with_values = [group for group in groups(runs) if all(own_values(run) for run in group)]
    if not with_values:
        return None
    columns: dict[str, list[str]] = {"runs": labels([group[0] for group in with_values])}
    metrics = [own_metric(group[0]) or "" for group in with_values]
    columns["of the clients’"] = [_called(metric) for metric in metrics]
    columns["clients"] = [str(len(own_values(group[0]))) for group in with_values]
    facts = [
        [_facts(run, metric) for run in group] for group, metric in zip(with_values, metrics, strict=True)
    ]
    for at, name in enumerate(["mean", "spread", "worst decile"]):
        columns[name] = [spread((fact[at] for fact in each), "loss") for each in facts]
    columns["worst client"] = [
        _worst(group[0], metric) for group, metric in zip(with_values, metrics, strict=True)
    ]
    if len(runs) == 1:
        columns.pop("runs")
    note = "Spread: standard deviation over clients. Worst decile: mean of the worst tenth, at least one."
    note += f" {INTERVAL}; the worst client is that of the first." if max(map(len, with_values)) > 1 else ""
    return Table("Fairness", [*columns], turned(columns), note)


def _facts(run: Run, metric: str) -> tuple[float, float, float]:
    values = worst_first([*own_values(run).values()], metric)
    worst = values[: max(1, len(values) // 10)]
    return statistics.fmean(values), statistics.pstdev(values), statistics.fmean(worst)


def _worst(run: Run, metric: str) -> str:
    values = own_values(run)
    worst = worst_first([*values.values()], metric)[0]
    return next(f"{name} ({score(value, 'loss')})" for name, value in values.items() if value == worst)


def _called(metric: str) -> str:
    return "training loss" if metric == "loss" else words(metric)


def _own(run: Run) -> dict[str, dict[str, Any]]:
    own = run.summary.get("own")
    return own if isinstance(own, dict) else {}


def _name(row: dict[str, Any]) -> str:
    return clean(row.get("name") or row["client"])


def _whole(value: object) -> str:
    found = number(value)
    return ABSENT if found is None else f"{found:,.0f}"


def _left_out(row: dict[str, Any]) -> str:
    """Why an update was left out: "dropped", "away" or "rejected"; empty if it was aggregated."""
    if (status := row.get("status")) in ("dropped", "away"):
        return str(status)
    return "rejected" if row.get("rejected") else ""


def _status(row: dict[str, Any]) -> str:
    parts = (_left_out(row) or row.get("status"), row.get("reason") or row.get("rejected"))
    return clean(": ".join(str(part) for part in parts if part))
