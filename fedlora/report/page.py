"""One self-contained HTML page about runs, with inlined pictures and tables that can be sorted."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedlora.errors import ConfigError
from fedlora.report import draw, plots
from fedlora.report.alarms import MEANING, collapses
from fedlora.report.answers import answers_table
from fedlora.report.clients import clients_table, fairness_table, holdings, left_out_table, ranks_table
from fedlora.report.compare import labels
from fedlora.report.headline import result, title
from fedlora.report.read import Run
from fedlora.report.seeds import groups, seeds_table
from fedlora.report.tables import (
    Table,
    changes_table,
    differences_table,
    privacy_table,
    provenance_table,
    runs_table,
)
from fedlora.storage.atomic import write_whole


@dataclass(frozen=True)
class ClientsOf:
    """What the page shows of one run's clients.

    Args:
        name: the run's.
        note: a remark in the place of the picture, or nothing.
        pictures: of the rows and labels that each client held.
        tables: by rank, and by client.
    """

    name: str
    note: str = ""
    pictures: list[plots.Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(runs: Sequence[Run], to: Path, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write the page atomically and return its path.

    Args:
        runs: the runs to show, in this order.
        to: the page's file.
        defaults: the default settings; the page of a single run shows the settings that differ from them.

    Raises:
        ConfigError: no run was given.
    """
    if not runs:
        raise ConfigError("report: expected one run folder or more, got none; name the folders to report on")
    text = render("page.html.j2", **_parts(runs, defaults or {}))
    return write_whole(to, lambda file: file.write_text(text, encoding="utf-8"))


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled; every value is escaped.

    Args:
        template: the file's name.
        values: what the template names.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"svg": _svg, "kinds": _kinds, "sha256": _sha256}
    return environment.get_template(template).render(values)


def _parts(runs: Sequence[Run], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the template page.html.j2, by name."""
    fairness = fairness_table(runs)
    return {
        "title": title(runs),
        "result": result(runs),
        "alarms": collapses(runs),
        "results": plots.results(runs),
        "over_seeds": seeds_table(runs),
        "each_run": runs_table(runs),
        "answers": answers_table(runs),
        "privacy": privacy_table(runs),
        "fairness": fairness,
        "by_client": plots.by_client(runs) if fairness else [],
        "exact": plots.exact(runs),
        "aggregation": plots.aggregation(runs),
        "tail_meaning": MEANING if any(run.series("tail_kept") for run in runs) else "",
        "clients": _clients(runs),
        "folded": len(runs) > 1,
        "left_out": left_out_table(runs),
        "differs": _differs(runs, defaults),
        "provenance": provenance_table(runs),
    }


def _clients(runs: Sequence[Run]) -> list[ClientsOf]:
    """The clients' part of each run; of runs that differ in their seed only, that of the first."""
    firsts = [group[0] for group in groups(runs)]
    shown, seen = [], dict[str, str]()
    for name, run in zip(labels(firsts), firsts, strict=True):
        picture, note = plots.data(run), ""
        if picture and (same := seen.setdefault(str(holdings(run)), name)) != name:
            picture, note = None, f"Rows and labels as those of {same}."
        tables = [table for table in (ranks_table(run), clients_table(run)) if table and table.rows]
        if picture or note or tables:
            shown.append(ClientsOf(name, note, [picture] if picture else [], tables))
    return shown


def _differs(runs: Sequence[Run], defaults: Mapping[str, Any]) -> Table | None:
    """The settings in which the runs differ, or a single run from the defaults; None if there are none."""
    if len(runs) == 1:
        table = changes_table(runs[0], defaults) if defaults else None
    else:
        table = differences_table([group[0] for group in groups(runs)])
    return table if table and len(table.header) > 1 and table.rows else None


def _svg(picture: plots.Picture) -> str:
    """A picture as base64, for a data URI."""
    return base64.b64encode(draw.svg(picture.figure)).decode("ascii")


def _kinds(table: Table) -> list[str]:
    """The CSS class of each column."""
    return [
        "hash" if name in ("SHA-256", "adapter") else "left" if table.left(column) else "number"
        for column, name in enumerate(table.header)
    ]


def _sha256(script: str) -> str:
    """A script's hash as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
