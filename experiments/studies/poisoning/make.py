"""What malicious clients do to a run, with and without a robust rule: accuracy after a few rounds.

    python experiments/studies/poisoning/make.py [--out experiments/studies/poisoning] [--seeds 0]

MiniLM on TREC, 10 clients of which 3 are malicious. "sign" sends five times the change turned round, "labels"
trains on wrong labels. Each rule is told how many there are, which in life nobody is. One core.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console

from fedlora.cli.run_job import run_job
from fedlora.config.composition import compose
from fedlora.report import read_run

JOB = (
    "model=minilm",
    "data=trec",
    "data.test_rows=300",
    "data.alpha=1.0",
    "clients=10",
    "rounds=4",
    "client.steps=12",
    "evaluate.every=4",
    "client=poisoned",
)
STRATEGIES = {
    "FFA-LoRA, ranks 4 8": ("strategy=ffalora", "ranks=[4,8]"),
    "FlexLoRA, ranks 4 8": ("strategy=flexlora", "ranks=[4,8]"),
    "FedIT, rank 8": ("strategy=fedit", "ranks=8"),
}
RULES = {
    "none": ("robust=none",),
    "norm": ("robust=norm",),
    "median": ("robust=median",),
    "trimmed": ("robust=trimmed", "robust.share=0.3"),
    "krum": ("robust=krum", "robust.malicious=3"),
}
ATTACKS = {
    "no attack": ("client.share=0",),
    "sign, 5 times": ("client.share=0.3", "client.kind=sign", "client.boost=5"),
    "wrong labels": ("client.share=0.3", "client.kind=labels"),
}


def accuracy(*overrides: str) -> float:
    """The test accuracy of one run after its last round."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*JOB, *overrides, f"out={folder}/run"])
        return float(read_run(run_job(config, Console(file=io.StringIO()))).summary["accuracy"])


def table(found: dict[tuple[str, str, str], list[float]]) -> list[str]:
    """A row a strategy and attack, a column a rule; means over seeds, with the range of several."""

    def cell(values: Sequence[float]) -> str:
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        return f"{fmean(values):.3f}{spread}" if values else ""

    lines = [f"| strategy | attack | {' | '.join(RULES)} |", "|---|---|" + "--:|" * len(RULES)]
    for strategy in STRATEGIES:
        for attack in ATTACKS:
            cells = [cell(found.get((strategy, attack, rule), [])) for rule in RULES]
            lines.append(f"| {strategy} | {attack} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run all, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began, found = time.perf_counter(), dict[tuple[str, str, str], list[float]]()
    for seed in given.seeds:
        for strategy, one in STRATEGIES.items():
            for attack, two in ATTACKS.items():
                for rule, three in RULES.items():
                    value = accuracy(*one, *two, *three, f"seed={seed}")
                    found.setdefault((strategy, attack, rule), []).append(value)
                    print(f"{strategy}, {attack}, {rule}, seed {seed}: {value:.3f}", flush=True)
    seeds = ", ".join(map(str, given.seeds))
    text = "\n".join([f"Seeds: {seeds}; {time.perf_counter() - began:.0f} s.", "", *table(found)])
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "table.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
