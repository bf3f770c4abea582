"""Throughput, memory and share of the peak beside the sequential loop, for several numbers of clients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .bench import Bench
from .peft_loop import PeftLoop, Work
from .report import Table
from .rows import CHAT_1K, CHAT_8K, FIXED, QUESTIONS, Batches, ordinary, round_of, tokens
from .shapes import operations

MOST_TELLING = 8  # clients, of whom the goals speak
OTHERS = (16, 1, 4)
REPEATS = 3
STEPS = {FIXED: 4, CHAT_1K: 4, CHAT_8K: 2, QUESTIONS: 4}  # of a client's round at 1B
TIMES = {FIXED: 1.5, CHAT_1K: 1.2, CHAT_8K: 0.97, QUESTIONS: 0.97}  # the loop's throughput, as goals have it
LEAST = 0.97  # for all other cells
SHARES = {"1B": 0.45, "8B": 0.55}  # of the peak, as goals have it
COLUMNS = ["model", "clients", "a step", "tokens a step", "PEFT loop, tokens/s", "fedlora, tokens/s", "times"]
COLUMNS += ["PEFT loop, GB", "fedlora, GB", "PEFT loop, of peak", "fedlora, of peak", "losses differ by"]
COLUMNS += ["same hash"]


@dataclass
class Cell:
    """One row of the table while it is measured, fedlora's side and the loop's.

    Args:
        bench: for the model.
        model: its name.
        clients: how many.
        batches: what a step holds.
    """

    bench: Bench
    model: str
    clients: int
    batches: Batches
    loss: dict[str, float] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        base, adapter = self.bench.model(self.model)
        self.steps = steps_of(self.batches, self.model, self.bench.judged)
        self.requests = round_of(
            base, [adapter] * self.clients, self.batches, self.steps, not self.bench.on_gpu
        )
        self.tokens, self.answered = tokens(self.requests)
        self.client = ordinary(self.batches, self.steps)
        self.work = [Work(adapter, self.client.batches(request)) for request in self.requests]

    def fedlora(self) -> None:
        """A round by fedlora's client."""
        results = self.client.train(self.bench.model(self.model)[0], self.requests)
        self.loss["fedlora"] = sum(result.metrics["loss"] for result in results) / len(results)
        self.last = results[-1].adapter

    def repeats(self) -> bool:
        """Whether a round repeated gives its last client the same bytes."""
        first = self.last.digest()
        self.fedlora()
        again: bool = self.last.digest() == first
        return again

    def loop(self, loop: PeftLoop) -> Callable[[], None]:
        """A round by the loop."""

        def run() -> None:
            _, losses = loop.round(self.work)
            self.loss["loop"] = float(losses.mean())

        return run


def steps_of(batches: Batches, model: str, judged: bool) -> int:
    """The steps of a client's round: fewer of the larger model, and where speed is not judged anyway."""
    return min(STEPS[batches] // (1 if model == "1B" else 2), 4 if judged else 2)


def speed_1b(bench: Bench) -> None:
    """Section 2, 1B: eight clients, three sizes of a step."""
    _rows(bench, "1B", [(MOST_TELLING, batches) for batches in (FIXED, CHAT_1K, CHAT_8K)])


def speed_8b(bench: Bench) -> None:
    """Section 2, 8B: eight clients, three sizes of a step."""
    _rows(bench, "8B", [(MOST_TELLING, batches) for batches in (CHAT_8K, CHAT_1K, FIXED)])


def clients_1b(bench: Bench) -> None:
    """Section 2, 1B: other numbers of clients, and short questions."""
    cells = [(MOST_TELLING, QUESTIONS)]
    _rows(bench, "1B", cells + [(k, batches) for batches in (FIXED, CHAT_1K, CHAT_8K) for k in OTHERS])


def clients_8b(bench: Bench) -> None:
    """Section 2, 8B: other numbers of clients."""
    _rows(bench, "8B", [(k, batches) for batches in (FIXED, CHAT_1K, CHAT_8K) for k in OTHERS])


def _rows(bench: Bench, model: str, cells: Sequence[tuple[int, Batches]]) -> None:
    """A table of these cells, as far as the time goes, and the goals that it judges."""
    base, adapter = bench.model(model)
    loop = PeftLoop(base.model, adapter)
    title = f"Throughput of a round at {model}, trained tokens a second: medians of {REPEATS} (least to most)"
    table = bench.report.table(title, COLUMNS)
    goals: list[tuple[int, str, bool | None]] = []
    took = 0.0
    try:
        for clients, batches in cells:
            if bench.left < took:
                bench.report.note(f"{clients} clients, {batches.name}: left out, the time is up")
                continue
            before = bench.left
            try:
                goals += _row(bench, table, loop, Cell(bench, model, clients, batches))
            except torch.OutOfMemoryError as error:
                bench.report.note(f"{clients} clients, {batches.name}: out of memory: {error}")
                goals.append((2, f"{model}, {clients} clients, {batches.name}: out of memory", False))
            bench.free()
            took = before - bench.left
    finally:
        for goal in goals:
            bench.report.goal(*goal)
        for way, why in loop.refused.items():
            bench.report.note(f"the PEFT loop was refused the way '{way}': {why}")


def _row(bench: Bench, table: Table, loop: PeftLoop, cell: Cell) -> list[tuple[int, str, bool | None]]:
    """Measure a cell, add its row, and return the goals that it judges."""
    loop.choose(cell.work[0])
    runs: dict[str, Callable[[], Any]] = {"loop": cell.loop(loop), "fedlora": cell.fedlora}
    found = bench.take_turns(runs, REPEATS if bench.judged else 1)
    theirs, ours = found["loop"], found["fedlora"]
    base = bench.model(cell.model)[0]
    needed = operations(base, cell.tokens, cell.answered) / (bench.peak or math.inf)
    times, share = theirs.median / ours.median, needed / ours.median
    apart = abs(cell.loss["fedlora"] - cell.loss["loop"]) / cell.loss["loop"]
    table.row(
        cell.model,
        cell.clients,
        cell.batches.name,
        round(cell.tokens / cell.clients / cell.steps),
        theirs.rates(cell.tokens),
        ours.rates(cell.tokens),
        times,
        theirs.peak,
        ours.peak,
        needed / theirs.median,
        share,
        apart,
        cell.repeats(),
        tokens=cell.tokens,
        steps=cell.steps,
        seconds={name: one.seconds for name, one in found.items()},
        loop={"way": loop.way, "tokens a pass": loop.room},
    )
    least = TIMES[cell.batches] if cell.clients == MOST_TELLING else LEAST
    what = f"{cell.model}, {cell.clients} clients, {cell.batches.name}"
    judged = [(2, f"{what}: at least {least} times the loop: {times:.2f}", times >= least)]
    if (cell.clients, cell.batches) == (MOST_TELLING, CHAT_8K):
        least = SHARES[cell.model]
        judged.append((3, f"{what}: at least {least:.0%} of the peak: {share:.1%}", share >= least))
    return [(number, said, met if bench.judged else None) for number, said, met in judged]
