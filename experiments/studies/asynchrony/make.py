"""Rounds with and without a barrier in virtual time, and what becomes of directions that few clients hold.

    python experiments/studies/asynchrony/make.py --still    # nobody learns: what is left of D
    python experiments/studies/asynchrony/make.py            # 1,000 clients, 50 at once, three seeds
    python experiments/studies/asynchrony/make.py --small    # the tiny model, 60 clients, one seed

Every schedule has the same number of trainings. The tables go to the terminal, all curves to runs.json.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import fedlora as fl
from fedlora.core.adapter import Pair
from fedlora.core.algebra import dense, truncate, weighted_sum
from fedlora.core.changes import Change, moved_extras
from fedlora.engines.in_process import InProcess
from fedlora.schedulers import Asynchronous, Buffered

HERE = Path(__file__).parent
SPEEDS = {"lognormal": 1.0, "absent": 0.1}
RANKS = [2, 4, 8, 16]


@dataclass(frozen=True)
class Mixed(fl.strategies.FlexLoRA):  # type: ignore[misc]
    """FlexLoRA under FedAsync's convex mix: D ← (1 − Σ c) D + Σ_k c_k s_k B_k A_k, with the truncated D_k."""

    def apply_changes(self, state: fl.State, changes: Sequence[Change]) -> fl.State:
        """Mix what the clients hold into the state, instead of adding what they have changed."""
        changes = self.admit_changes(state, changes)
        weights = [one.weight for one in changes]
        pairs: dict[str, Pair] = {}
        for name, old in state.adapter.pairs.items():
            sent = [one.update.adapter.pairs[name] for one in changes]
            pairs[name] = weighted_sum([old, *sent], [1 - sum(weights), *weights], old.scale)
        adapter = replace(state.adapter, pairs=pairs, extra=moved_extras(state, changes))
        return replace(state, adapter=adapter, round=state.round + 1)


@dataclass(frozen=True)
class Size:
    """How large the study is; `trainings` counts those of all clients together."""

    model: str
    lr: float
    target: float
    clients: int
    at_once: int
    buffer: int
    trainings: int
    seeds: Sequence[int]


LARGE = Size("minilm", 2e-3, 0.8, clients=1000, at_once=50, buffer=10, trainings=3000, seeds=(0, 1, 2))
SMALL = Size("tiny", 1e-2, 0.6, clients=60, at_once=6, buffer=3, trainings=120, seeds=(0,))


def settings(size: Size) -> dict[str, dict[str, Any]]:
    """The schedules by name: those of arguments of `simulate` in which they differ."""
    rounds, each = size.trainings // size.at_once, InProcess(speeds=SPEEDS)
    more = InProcess(speeds=SPEEDS, over_select=0.3)
    few = size.trainings // size.buffer
    return {
        "synchronous": {"rounds": rounds, "engine": each},
        "over-selection": {"rounds": rounds, "engine": more},
        f"buffered {size.buffer}": {
            "rounds": few, "engine": each, "scheduler": Buffered(buffer=size.buffer),
        },
        "asynchronous": {
            "rounds": size.trainings, "engine": each, "scheduler": Asynchronous(alpha=1 / size.buffer),
        },
    }  # fmt: skip


def main() -> None:
    """Run all of it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--still", action="store_true")
    given = parser.parse_args()
    if given.still:
        still()
        return
    size = SMALL if given.small else LARGE
    found: dict[str, list[dict[str, Any]]] = {}
    for strategy in (fl.strategies.FlexLoRA(), fl.strategies.FFALoRA()):
        for name, schedule in settings(size).items():
            for seed in size.seeds:
                done = trained(size, strategy, schedule, seed)
                found.setdefault(f"{type(strategy).__name__}, {name}", []).append(done)
                print(said(f"{type(strategy).__name__}, {name}", [done]), flush=True)
    for strategy in (fl.strategies.FlexLoRA(), Mixed()):
        schedule = settings(size)["asynchronous"] | {"scheduler": Asynchronous(alpha=0.5)}
        kept = [trained(size, strategy, schedule, seed) for seed in size.seeds]
        found[f"{type(strategy).__name__}, asynchronous, alpha 0.5"] = kept
    for name, runs in found.items():
        print(said(name, runs))
    (HERE / "runs.json").write_text(json.dumps(found) + "\n")


def still(steps: int = 12) -> None:
    """Print ‖D‖ and the share of its tail that is left where clients send back what they were sent."""
    rng = np.random.default_rng(0)
    A, B = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((16, 64), (48, 16)))
    peers = [fl.Peer(client, rank) for client, rank in enumerate(RANKS)]
    print(
        "| α = 0.5, client k of rank 2, 4, 8, 16 in turn | "
        + " | ".join(map(str, range(1, steps + 1)))
        + " |"
    )
    for strategy in (fl.strategies.FlexLoRA(), Mixed()):
        state = strategy.init(fl.Adapter({"layer": fl.Pair(A, B)}))
        begun = state.adapter.pairs["layer"]
        tail, left = dense(begun) - dense(truncate(begun, RANKS[0])), []
        for step in range(steps):
            peer = peers[step % len(peers)]
            task = strategy.task(state, peer)
            update = fl.Update(task.adapter, peer=peer)
            state = strategy.apply_changes(state, [Change(update, task, factor=0.5)])
            left.append(float((state.delta("layer") * tail).sum() / tail.norm() ** 2))
        print(f"| {type(strategy).__name__} | " + " | ".join(f"{share:.3f}" for share in left) + " |")


def trained(size: Size, strategy: fl.Strategy, schedule: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run: its curve in virtual time, its bytes, and the least share of the tail that a round kept."""
    run = fl.simulate(
        size.model,
        "vader",
        strategy=strategy,
        client=fl.clients.LocalTraining(lr=size.lr * strategy.lr_factor, steps=4, batch_size=4),
        partition="iid",
        data_options={"min_rows": 1, "max_rows": None},
        clients=size.clients,
        clients_per_round=size.at_once,
        ranks=RANKS,
        evaluate={"every": max(1, schedule["rounds"] // 20)},
        seed=seed,
        progress=False,
        **schedule,
    )
    lines = [line for line in run.metrics if "accuracy" in line]
    tails = [line["tail_kept"] for line in run.metrics if "tail_kept" in line]
    return {
        "curve": [(line["virtual_seconds"], line["accuracy"]) for line in lines],
        "accuracy": lines[-1]["accuracy"],
        "virtual_seconds": run.metrics[-1]["virtual_seconds"],
        "reached": next((line["virtual_seconds"] for line in lines if line["accuracy"] >= size.target), None),
        "megabytes": (run.summary["bytes_down"] + run.summary["bytes_up"]) / 1e6,
        "staleness": fmean([line.get("staleness", 0.0) for line in run.metrics]),
        "rank": run.metrics[-1]["effective_rank"],
        "tail_kept": min(tails, default=None),
    }


def said(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """A row of the table: the means over seeds."""

    def mean(key: str, digits: int) -> str:
        values = [run[key] for run in runs]
        return "-" if None in values else f"{fmean(values):.{digits}f}"

    keys = {"accuracy": 3, "virtual_seconds": 0, "reached": 0, "megabytes": 1, "staleness": 1, "rank": 1}
    cells = [mean(key, digits) for key, digits in {**keys, "tail_kept": 2}.items()]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
