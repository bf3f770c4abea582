"""The table of answers of instruction models: scores before and after training, by client if known."""

from collections.abc import Sequence
from typing import Any

from fedlora.report.compare import ABSENT, clean, labels
from fedlora.report.read import Run, evaluated
from fedlora.report.tables import Table, score, turned


def answers_table(runs: Sequence[Run]) -> Table | None:
    """A row for each run, and for a single run also a row for each client; None if no run has answers."""
    answered = [(name, run) for name, run in zip(labels(runs), runs, strict=True) if _asked(run.summary)]
    if not answered:
        return None
    rows = [(name, _initial(run), run.summary) for name, run in answered]
    if len(runs) == 1:
        (_, base, final), found = rows[0], answered[0][1].summary.get("answers")
        own, before = (part if isinstance(part, dict) else {} for part in (found, base.get("answers")))
        rows = [("all", base, final), *((clean(name), before.get(name) or {}, own[name]) for name in own)]
    columns = {
        "of" if len(runs) == 1 else "run": [name for name, _, _ in rows],
        "answers": [str(final.get("answered") or ABSENT) for _, _, final in rows],
        "exact match, base": [score(base.get("exact_match"), "accuracy") for _, base, _ in rows],
        "exact match": [score(final.get("exact_match"), "accuracy") for _, _, final in rows],
        "ROUGE-L, base": [score(base.get("rouge_l"), "accuracy") for _, base, _ in rows],
        "ROUGE-L": [score(final.get("rouge_l"), "accuracy") for _, _, final in rows],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {ABSENT}}
    note = f"Greedy answers to {evaluated(runs)}; answers.jsonl in a run’s folder has every one."
    return Table("Answers", [*shown], turned(shown), note)


def _asked(summary: dict[str, Any]) -> bool:
    return "exact_match" in summary


def _initial(run: Run) -> dict[str, Any]:
    found = run.summary.get("initial")
    return found if isinstance(found, dict) else {}
