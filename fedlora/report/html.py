"""One self-contained HTML page about one or several runs: no network, pictures inlined, tables that sort."""

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError
from fedlora.report import draw, plots
from fedlora.report.alarms import MEANING, collapses
from fedlora.report.answers import answers_table
from fedlora.report.clients import (
    absences,
    clients_table,
    fairness_table,
    holdings,
    left_out_table,
    ranks_table,
)
from fedlora.report.compare import clean, labels, words
from fedlora.report.page import PAGE
from fedlora.report.read import Run, number
from fedlora.report.seeds import groups, interval, seeds_table, spread
from fedlora.report.tables import (
    Table,
    changes_table,
    differences_table,
    megabytes,
    privacy_table,
    provenance_table,
    runs_table,
    score,
)


def write_report(runs: Sequence[Run], to: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write the page, under a temporary name first, and return where it is.

    Args:
        runs: the runs to show, in this order.
        to: the page's file.
        defaults: settings of a run that says none; what of a single run differs from them is shown.

    Raises:
        ConfigError: no run was given.
    """
    if not runs:
        raise ConfigError("report: expected one run folder or more, got none; name the folders to report on")
    page = PAGE.substitute(
        title=escape(_title(runs)), result=escape(_result(runs)), body="\n".join(_body(runs, defaults or {}))
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, to)
    return to


def _body(runs: Sequence[Run], defaults: Mapping[str, Any]) -> list[str]:
    alarms = "<br>".join(map(escape, collapses(runs)))
    over, each = seeds_table(runs), runs_table(runs)
    shown = [f'<p class="alarm">{alarms}</p>' if alarms else "", _pictures(plots.results(runs))]
    shown.append(_section(over or each))
    if over:
        shown.append(f"<details><summary>Every run</summary>{_cells(each)}</details>")
    shown.append(_optional(answers_table(runs)))
    shown.append(_optional(privacy_table(runs)))
    fair = fairness_table(runs)
    shown.append(_section(fair, _pictures(plots.by_client(runs))) if fair else "")
    shown += _aggregation(runs)
    shown += _clients(runs)
    shown.append(_optional(left_out_table(runs)))
    firsts = [group[0] for group in groups(runs)]
    differs = differences_table(firsts) if len(runs) > 1 else changes_table(runs[0], defaults)
    if len(differs.header) > 1 and differs.rows and (len(runs) > 1 or defaults):
        shown.append(_section(differs))
    shown.append(_section(provenance_table(runs)))
    return [part for part in shown if part]


def _aggregation(runs: Sequence[Run]) -> list[str]:
    """The certificate of every round, how many directions carry the update, and what becomes of its tail."""
    shown, error = [_pictures(plots.aggregation(runs))], plots.exact(runs)
    if error is not None:
        text = "In every round the update is the exact weighted sum of the clients’, up to rounding"
        shown.insert(0, f"<p>{text}: its error is {error:.0e} of it at most.</p>")
    if any(run.series("tail_kept") for run in runs):
        shown.append(f'<p class="note">{escape(MEANING)}</p>')
    return ["<h2>Aggregation</h2>", *shown] if any(shown) else []


def _clients(runs: Sequence[Run]) -> list[str]:
    """What the clients were and did; of several runs folded up, the first of each setting."""
    firsts = [group[0] for group in groups(runs)]
    shown, seen = [], dict[str, str]()
    for name, run in zip(labels(firsts), firsts, strict=True):
        inside, picture = [], plots.data(run)
        if picture and (same := seen.setdefault(str(holdings(run)), name)) != name:
            inside.append(f'<p class="note">{escape(f"Rows and labels as those of {same}.")}</p>')
        elif picture:
            inside.append(_pictures([picture]))
        inside += [_inner(table) for table in (ranks_table(run), clients_table(run)) if table and table.rows]
        if not any(inside):
            continue
        text = "\n".join(inside)
        shown.append(
            text if len(runs) == 1 else f"<details><summary>{escape(name)}</summary>{text}</details>"
        )
    return ["<h2>Clients</h2>", *shown] if shown else []


def _title(runs: Sequence[Run]) -> str:
    name = labels(runs)[0] if len(runs) == 1 else f"{len(runs)} runs"
    data = {clean(run.summary.get("data")) for run in runs}
    return f"{name} on {data.pop()}" if len(data) == 1 else name


def _result(runs: Sequence[Run]) -> str:
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


def _pictures(shown: Sequence[plots.Picture]) -> str:
    figures = []
    for picture in shown:
        data = base64.b64encode(draw.svg(picture.figure)).decode("ascii")
        told = escape(f"{picture.caption} {picture.told}")
        figures.append(
            f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{told}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _optional(table: Table | None) -> str:
    return "" if table is None else _section(table)


def _section(table: Table, more: str = "") -> str:
    return f"<h2>{escape(table.title)}</h2>\n{_cells(table) if table.header else _facts(table)}{more}"


def _inner(table: Table) -> str:
    return f"<h3>{escape(table.title)}</h3>\n{_cells(table)}"


def _facts(table: Table) -> str:
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in table.rows)
    return f"<dl>{''.join(pairs)}</dl>"


def _cells(table: Table) -> str:
    kinds = [
        "hash" if name in ("SHA-256", "adapter") else "left" if table.left(column) else "number"
        for column, name in enumerate(table.header)
    ]
    head = _row("th", kinds, table.header)
    rows = [_row("td", kinds, row, at in table.marked) for at, row in enumerate(table.rows)]
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n{note}'
    )


def _row(tag: str, kinds: Sequence[str], cells: Sequence[str], marked: bool = False) -> str:
    shown = (f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))
    kind = ' class="marked"' if marked else ""
    return f"<tr{kind}>{''.join(shown)}</tr>"
