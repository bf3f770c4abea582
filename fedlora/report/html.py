"""One self-contained HTML page about one or several runs: no network, no scripts, pictures inlined."""

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from fedlora.errors import ConfigError
from fedlora.report import plots
from fedlora.report.compare import clean, labels, words
from fedlora.report.read import Run, number
from fedlora.report.seeds import seeds_table
from fedlora.report.tables import (
    Table,
    clients_table,
    differences_table,
    megabytes,
    privacy_table,
    provenance_table,
    runs_table,
    score,
)

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1rem 4rem; background: #fff; color: #222;
  font: 1.0625rem/1.55 Charter, "Bitstream Charter", "Source Serif 4", Georgia, "Liberation Serif", serif; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.6rem 0 .6rem; }
.result { font-size: 1.2rem; margin: 0; max-width: 54rem; overflow-wrap: anywhere; text-wrap: pretty; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 2rem 2.5rem; margin-top: 2.2rem; }
figure { margin: 0; break-inside: avoid; }
img { display: block; width: 100%; max-width: 32rem; height: auto; }
figcaption, .note { font-size: .92rem; line-height: 1.45; color: #555; margin: .5rem 0 0; max-width: 32rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums; border: solid #222; border-width: 1.5px 0; }
th, td { padding: .28rem 1.1rem .28rem 0; text-align: right; white-space: nowrap; vertical-align: baseline; }
th { font-weight: 600; border-bottom: 1px solid #999; }
.left, .hash { text-align: left; }
td.left { white-space: normal; min-width: 5rem; overflow-wrap: anywhere; }
td.left:last-child { min-width: 14rem; }
td.hash { font: .85em/1.4 ui-monospace, Menlo, "DejaVu Sans Mono", monospace; }
th:last-child, td:last-child { padding-right: .2rem; }
.marked { color: #a3320b; background: #fdf1ec; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .9rem 1rem; margin: 0;
  padding: .8rem 0; border: solid #222; border-width: 1.5px 0; font-variant-numeric: lining-nums; }
dt { font-size: .85rem; line-height: 1.3; color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="result">$result</p>
<div class="pictures">
$pictures
</div>
$tables
</body>
</html>
""")


def write_report(runs: Sequence[Run], to: Path) -> Path:
    """Write the page, under a temporary name first, and return where it is.

    Args:
        runs: the runs to show, in this order.
        to: the page's file.

    Raises:
        ConfigError: no run was given.
    """
    if not runs:
        raise ConfigError("report: expected one run folder or more, got none; name the folders to report on")
    page = _PAGE.substitute(
        title=escape(_title(runs)),
        result=escape(_result(runs)),
        pictures="\n".join(_pictures(runs)),
        tables="\n".join(_tables(runs)),
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, to)
    return to


def _title(runs: Sequence[Run]) -> str:
    name = labels(runs)[0] if len(runs) == 1 else f"{len(runs)} runs"
    data = {clean(run.summary.get("data")) for run in runs}
    return f"{name} on {data.pop()}" if len(data) == 1 else name


def _result(runs: Sequence[Run]) -> str:
    """One sentence: what a single run reached, or which of several comparable runs did best."""
    names = labels(runs)
    if len(runs) == 1:
        return _reached(runs[0], names[0])
    final = [number(run.summary.get(runs[0].metric)) for run in runs]
    alike = {(run.metric, run.summary.get("data"), run.summary.get("model")) for run in runs}
    measured = [value for value in final if value is not None]
    if len(alike) > 1 or len(measured) < len(runs):
        return (
            "The runs differ in model, data or metric, or were not all measured, so none is called the best."
        )
    top = (max if runs[0].more_is_better else min)(measured)
    winners = [at for at, value in enumerate(final) if value == top]
    level = f" (level with {', '.join(names[at] for at in winners[1:])})" if winners[1:] else ""
    return f"Best of {len(runs)}: {_reached(runs[winners[0]], names[winners[0]])[:-1]}{level}."


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


def _pictures(runs: Sequence[Run]) -> list[str]:
    shown = []
    for metric in sorted({run.metric for run in runs}):
        word = words(metric).capitalize()
        over_rounds = f"{word} on the test rows after each round; round 0 is before training."
        over_traffic = f"{word} against all that was sent until then, to and from all clients."
        shown.append(_picture(plots.metric_over_rounds(runs, metric), over_rounds, _ends(runs, metric)))
        shown.append(_picture(plots.metric_over_traffic(runs, metric), over_traffic, _ends(runs, metric)))
        over_epsilon = f"{word} on the test rows against ε, which is of the whole run and never of a round."
        shown.append(_picture(plots.metric_over_epsilon(runs, metric), over_epsilon, _ends(runs, "epsilon")))
    loss = "Loss after each round, on the test rows and, dashed, in the clients’ training."
    error = (
        "How far the server’s update is from the exact weighted sum of the clients’, relative to that sum."
    )
    shown.append(_picture(plots.loss_over_rounds(runs), loss, _ends(runs, "loss")))
    shown.append(_picture(plots.error_over_rounds(runs), error, _ends(runs, "aggregation_error")))
    return [picture for picture in shown if picture]


def _picture(svg: bytes | None, caption: str, alternative: str) -> str:
    if svg is None:
        return ""
    data = base64.b64encode(svg).decode("ascii")
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(f"{caption} {alternative}")}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _ends(runs: Sequence[Run], key: str) -> str:
    """Where each line starts and ends, in words, for those who cannot see it."""
    told = []
    for run, name in zip(runs, labels(runs), strict=True):
        if line := run.series(key):
            (first, start), (last, end) = line[0], line[-1]
            told.append(f"{name}: {start:.3g} in round {first}, {end:.3g} in round {last}.")
    return " ".join(told)


def _tables(runs: Sequence[Run]) -> list[str]:
    over = seeds_table(runs)
    shown = [] if over is None else [_section(over)]
    shown.append(_section(runs_table(runs)))
    if (private := privacy_table(runs)) is not None:
        shown.append(_section(private))
    differs = differences_table(runs)
    if len(differs.header) > 1:
        shown.append(_section(differs))
    clients = [
        (name, clients_table(run)) for name, run in zip(labels(runs), runs, strict=True) if run.clients
    ]
    if len(runs) == 1:
        shown += [_section(table) for _, table in clients]
    elif clients:
        shown.append("<h2>Clients</h2>")
        shown += [
            f"<details><summary>{escape(f'{name}: {table.title.lower()}')}</summary>{_cells(table)}</details>"
            for name, table in clients
        ]
    shown.append(_section(provenance_table(runs)))
    return shown


def _section(table: Table) -> str:
    return f"<h2>{escape(table.title)}</h2>\n{_cells(table) if table.header else _facts(table)}"


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
