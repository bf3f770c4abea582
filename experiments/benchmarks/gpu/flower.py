"""Flower's simulation with a fraction of the GPU for each client, beside fedlora's round, at 1B."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..peers.measured import environment
from .bench import Bench
from .rows import CHAT_1K, FIXED
from .throughput import MOST_TELLING, TIMES, Cell

ROOT = Path(__file__).parents[3]
ROUNDS = 3  # of each size of a step; the first warms up
SIZES = (FIXED, CHAT_1K)
ACTORS = min(4, os.cpu_count() or 1)  # processes that share the GPU
COLUMNS = ["clients", "a step", "Flower, tokens/s", "fedlora, tokens/s", "times", "Flower, GB", "fedlora, GB"]


@dataclass(frozen=True)
class Job:
    """What the processes of the simulation are told.

    Args:
        device: "cuda" or "cpu".
        tiny: as of the benchmark.
        clients: how many.
        actors: processes that train at the same time.
    """

    device: str
    tiny: bool
    clients: int
    actors: int

    def write(self, folder: Path) -> None:
        """Write it down."""
        (folder / "job.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """What `write` wrote."""
        return cls(**json.loads((folder / "job.json").read_text(encoding="utf-8")))


def flower(bench: Bench) -> None:
    """Section 2, the second peer: Flower's simulation on Ray."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        bench.report.note("Flower's simulation is left out: flwr or ray is not installed")
        return
    cells = {batches: Cell(bench, "1B", MOST_TELLING, batches) for batches in SIZES}
    bench.free()
    rounds, peak = _simulated(bench, Job(bench.device, bench.tiny, MOST_TELLING, ACTORS))
    title = f"Flower's simulation at 1B, {ACTORS} processes on one GPU, its later rounds"
    table = bench.report.table(title, COLUMNS)
    for at, (batches, cell) in enumerate(cells.items()):
        own = rounds[at * ROUNDS + 1 : (at + 1) * ROUNDS]
        theirs = cell.tokens * len(own) / sum(own)
        found = bench.take_turns({"fedlora": cell.fedlora}, ROUNDS)["fedlora"]
        ours = cell.tokens / found.median
        table.row(MOST_TELLING, batches.name, theirs, ours, ours / theirs, peak, found.peak)
        least = TIMES[batches]
        what = f"1B, {batches.name}: at least {least} times Flower's simulation: {ours / theirs:.2f}"
        bench.report.goal(2, what, ours / theirs >= least if bench.judged else None)


def _simulated(bench: Bench, job: Job) -> tuple[list[float], float]:
    """Seconds of each round of a simulation, and the GB of the GPU's memory that it took at most."""
    command = [sys.executable, "-m", "experiments.benchmarks.gpu.flower_sim"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="gpu-") as where:
        folder = Path(where)
        job.write(folder)
        with (folder / "log").open("w") as log, _Used(bench) as used:
            process = subprocess.Popen(
                [*command, where],
                env=environment({"PYTHONPATH": path}),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            try:
                said, _ = process.communicate(timeout=max(1.0, bench.left))
            finally:
                if process.poll() is None:  # its actors are in its session, too
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode:
            last_lines = (folder / "log").read_text().splitlines()[-15:]
            raise RuntimeError(f"the simulation ended with {process.returncode}:\n" + "\n".join(last_lines))
    rounds = [float(line.split()[-1]) for line in said.splitlines() if line.startswith("round")]
    return rounds, used.peak


class _Used:
    """The GPU's memory that others take within the block, at most, in GB."""

    def __init__(self, bench: Bench) -> None:
        self._on, self._done, self.peak = bench.on_gpu, threading.Event(), 0.0

    def __enter__(self) -> "_Used":
        self._before = self._look()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._done.wait(0.1):
            self.peak = max(self.peak, self._look() - self._before)

    def _look(self) -> float:
        if not self._on:
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9
