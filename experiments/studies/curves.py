"""The numbers of finished runs in one JSON file, and their curves side by side in one picture.

    python experiments/studies/curves.py --to FOLDER PANEL=RUN,RUN,... [PANEL=RUN,RUN,...]

Writes FOLDER/runs.json: of every run what its summary says, headline metric and loss by round, and seconds
and bytes of each round; and FOLDER/curves.png with a panel for every PANEL: runs that differ in their seed
alone are one line, their mean, in a band from the lowest to the highest. A RUN may be a folder of runs. Lines
are called by their strategies, or with --names KEY by that setting, such as privacy.epsilon.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedlora.report import read_run
from fedlora.report.draw import COLOURS
from fedlora.report.read import Run

KEPT = [
    "accuracy",
    "loss",
    "perplexity",
    "exact_match",
    "rouge_l",
    "answers",
    "majority",
    "initial",
    "rounds",
    "clients",
    "ranks",
    "seed",
    "bytes_down",
    "bytes_up",
    "dropped",
    "startup_seconds",
    "wall_seconds",
    "peak_memory_mb",
    "epsilon",
    "adapter_sha256",
    "versions",
]


def runs_in(folder: Path) -> list[Run]:
    """The finished run in this folder, or those under it."""
    return [read_run(found.parent) for found in sorted(folder.glob("**/summary.json"))]


def name_of(run: Run, key: str | None) -> str:
    """What a run's line is called."""
    if key is None:
        return run.strategy
    node: Any = run.config
    for word in key.split("."):
        node = node.get(word) if isinstance(node, dict) else None
    return str(node)


def numbers(run: Run, name: str) -> dict[str, Any]:
    """What is kept of a run."""
    summary = {key: run.summary[key] for key in KEPT if key in run.summary}
    sent = [line["bytes_down"] + line["bytes_up"] for line in run.metrics]
    by_round = {key: run.series(key) for key in dict.fromkeys((run.metric, "loss", "effective_rank"))}
    times = [round(line["seconds"], 3) for line in run.metrics]
    lr, path = run.config["client"]["lr"], f"{run.path.parent.name}/{run.path.name}"
    known = {"run": path, "name": name, "strategy": run.strategy, "lr": lr}
    return {**known, **summary, "by_round": by_round, "bytes_by_round": sent, "seconds_by_round": times}


def draw(panels: dict[str, list[Run]], key: str | None) -> Figure:
    """A panel of curves for each name, with one scale."""
    figure = Figure(figsize=(3.2 * len(panels) + 0.6, 3.3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, runs) in zip(axes, panels.items(), strict=True):
        lines: dict[str, list[Run]] = {}
        for run in runs:
            lines.setdefault(name_of(run, key), []).append(run)
        for colour, (name, group) in zip(COLOURS, lines.items(), strict=False):
            each = [dict(run.series(run.metric)) for run in group]
            at = sorted(set.intersection(*(set(found) for found in each)))
            values = [[found[x] for found in each] for x in at]
            ax.plot(
                at, [statistics.fmean(y) for y in values], color=colour, marker="o", markersize=3, label=name
            )
            ax.fill_between(
                at, [min(y) for y in values], [max(y) for y in values], color=colour, alpha=0.12, lw=0
            )
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("round")
        ax.grid(color="#e4e4e4", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(next(iter(panels.values()))[0].metric)
    if len(axes[-1].get_legend_handles_labels()[1]) > 1:
        axes[-1].legend(fontsize=8, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Write the numbers and the picture."""
    parser = argparse.ArgumentParser(description="Numbers and curves of finished runs.")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="gets runs.json and curves.png"
    )
    parser.add_argument(
        "--names", metavar="KEY", help="the setting that lines are called by; default: the strategy"
    )
    parser.add_argument(
        "panels", nargs="+", metavar="PANEL=RUN,RUN", help="a panel's title and its runs' folders"
    )
    given = parser.parse_args(argv)
    panels: dict[str, list[Run]] = {}
    for word in given.panels:
        title, _, folders = word.partition("=")
        panels[title] = [run for folder in folders.split(",") for run in runs_in(Path(folder))]
    given.to.mkdir(parents=True, exist_ok=True)
    lines = [
        {"panel": t, **numbers(run, name_of(run, given.names))} for t, runs in panels.items() for run in runs
    ]
    text = ",\n".join(json.dumps(line) for line in lines)
    (given.to / "runs.json").write_text(f"[\n{text}\n]\n", "utf-8")
    draw(panels, given.names).savefig(given.to / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
