"""A pass of training beside a plain PEFT loop, over row lengths, batch sizes and numbers of clients.

    python -m experiments.benchmarks.grid [--lengths 16 64 128 256] [--batches 1 8 32] [--clients 1 8]
                                          [--repeats 3] [--to DIR] [KEY=VALUE ...]

MiniLM, rank 8 on query and value and the classifier. Every row of a cell has the same number of tokens, so
the plain loop pads nothing, which is its best case. Each system is a process of its own that is started once
and has all cores; the two take turns, and of each cell the least of the repeats counts. Nothing is measured
but local training: no start, messages, evaluation or records. More settings are for fedlora's client, such
as client.micro_tokens=256.

A machine with other work makes seconds longer by the time for which threads wait for a core. Linux counts
that time for each thread. "Free" is the wall time less that waiting, divided by the cores, which is what the
pass would take on a machine without other work, as far as that can be told.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .peers.measured import environment
from .peers.shared import Job, Row, build, load, train

TOKENS = 4096  # a client's steps hold about so many in all, but it makes at least one step and at most four
SYSTEMS = {"bare": {}, "fedlora": {"OMP_WAIT_POLICY": "PASSIVE"}}  # the second as the fedlora command sets it
Cell = tuple[int, int, int]  # tokens a row, rows a batch, clients


def rows_of(cell: Cell) -> list[list[Row]]:
    """The rows of each client, the same for both systems."""
    length, batch, clients = cell
    steps = min(4, max(1, TOKENS // (length * batch)))
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (clients, steps * batch, length), generator=made).tolist()
    return [[(row, i % 6) for i, row in enumerate(own)] for own in ids]


def bare(folder: Path) -> Callable[[Cell], Callable[[], None]]:
    """The loop, from a cell to its pass: the clients one after the other."""
    job = Job.read(folder)
    model = build(job)

    def prepare(cell: Cell) -> Callable[[], None]:
        rows, batch = rows_of(cell), cell[1]
        orders = [[list(range(i, i + batch)) for i in range(0, len(own), batch)] for own in rows]
        now = replace(job, rows=rows, orders=[orders])

        def work() -> None:
            for client in range(len(rows)):
                load(model, job.start)
                train(model, now, 1, client)

        return work

    return prepare


def fedlora(words: Sequence[str]) -> Callable[[Cell], Callable[[], None]]:
    """The client of fedlora, from a cell to its pass."""
    from fedlora.clients import LocalTraining
    from fedlora.config.composition import compose
    from fedlora.config.translate import run_spec
    from fedlora.data import Example
    from fedlora.runner.assemble import assemble
    from fedlora.training.client import TrainRequest

    from .peers.jobfile import Size

    job = assemble(run_spec(compose([*Size(clients=1, rows=8, rounds=1).words(), *words])))
    task = job.spec.strategy.task(job.start, job.peer(0, 8))
    assert isinstance(job.runtime.client, LocalTraining)
    local = job.runtime.client

    def prepare(cell: Cell) -> Callable[[], None]:
        client = replace(local, batch_size=cell[1])
        work = [
            TrainRequest(at, 1, 0, task, [Example(ids, label) for ids, label in own])
            for at, own in enumerate(rows_of(cell))
        ]

        def train_all() -> None:
            client.train(job.base, work)

        return train_all

    return prepare


def serve(prepare: Callable[[Cell], Callable[[], None]]) -> None:
    """Run the pass of each cell that a line of the input names, and print what it took."""
    known: dict[Cell, Callable[[], None]] = {}
    for line in sys.stdin:
        length, batch, clients = json.loads(line)
        cell = (length, batch, clients)
        if cell not in known:
            known = {cell: prepare(cell)}
            known[cell]()  # warms up
        with Waiting() as waiting:
            began, cpu = time.perf_counter(), time.process_time()
            known[cell]()
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        found = {"wall": wall, "cpu": cpu, "free": wall - waiting.seconds / torch.get_num_threads()}
        print(json.dumps(found), flush=True)


class Waiting:
    """The seconds for which this process's threads wait for a core, those that end meanwhile included."""

    def __enter__(self) -> "Waiting":
        self._before, self._last = self._look(), dict[str, float]()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._go_on, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._last |= self._look()
        self._done.set()
        self._watch.join()
        self.seconds = sum(value - self._before.get(name, 0.0) for name, value in self._last.items())

    def _go_on(self) -> None:
        while not self._done.wait(0.05):
            self._last |= self._look()

    def _look(self) -> dict[str, float]:
        found = {}
        for thread in os.listdir("/proc/self/task"):
            try:
                statistics = Path(f"/proc/self/task/{thread}/schedstat").read_text()
            except OSError:  # it has ended
                continue
            found[thread] = int(statistics.split()[1]) / 1e9
        return found


def measure(cells: Sequence[Cell], repeats: int, words: Sequence[str]) -> dict[Cell, dict[str, Any]]:
    """The least seconds of each cell and system, by what they are of."""
    from .peers.jobfile import Size, written

    found: dict[Cell, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        written(Size(clients=1, rows=8, rounds=1)).write(Path(folder))
        command = [sys.executable, "-m", "experiments.benchmarks.grid", "--folder", folder]
        running = {
            name: subprocess.Popen(
                [*command, "--serve", name, *words],
                env=environment(more),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, more in SYSTEMS.items()
        }
        try:
            for cell in cells:
                timed = [{name: _ask(one, cell) for name, one in running.items()} for _ in range(repeats)]
                found[cell] = {
                    name: {key: min(one[name][key] for one in timed) for key in timed[0][name]}
                    for name in running
                }
                print(_line(cell, found[cell]), flush=True)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    return found


def main() -> None:
    """Measure, print a table, and write it as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--serve", choices=[*SYSTEMS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given, words = parser.parse_known_args()
    if given.serve:
        return serve(bare(given.folder) if given.serve == "bare" else fedlora(words))
    print("| tokens a row | rows a batch | clients | plain, s | fedlora, s | ratio | free | CPU |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    cells = list(itertools.product(given.lengths, given.batches, given.clients))
    found = measure(cells, given.repeats, words)
    ratios = [one["fedlora"]["free"] / one["bare"]["free"] for one in found.values()]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\nfree, fedlora over plain: geometric mean {mean:.2f}, largest {max(ratios):.2f}")
    if given.to is not None:
        given.to.mkdir(parents=True, exist_ok=True)
        records = [{"length": c[0], "batch": c[1], "clients": c[2], **one} for c, one in found.items()]
        (given.to / "grid.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return None


def _ask(process: subprocess.Popen[str], cell: Cell) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(cell) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a system ended at the cell {cell}; what it said is above")
    found: dict[str, float] = json.loads(line)
    return found


def _line(cell: Cell, found: dict[str, Any]) -> str:
    plain, ours = found["bare"], found["fedlora"]
    ratios = " | ".join(f"{ours[key] / plain[key]:.2f}" for key in ("wall", "free", "cpu"))
    length, batch, clients = cell
    return f"| {length} | {batch} | {clients} | {plain['wall']:.2f} | {ours['wall']:.2f} | {ratios} |"


if __name__ == "__main__":
    main()
