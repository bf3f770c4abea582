"""Flower's own simulation on Ray, with its FedAvg and the sequential loop in each client.

    python -m experiments.benchmarks.gpu.flower_sim FOLDER

Chosen in Flower's favour: an actor makes its model once and keeps it; no evaluation messages; no dashboard;
no logs. It prints a line a round with its seconds.
"""

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from .bench import RANK
from .flower import ROUNDS, SIZES, Job
from .flower_client import app
from .shapes import LLAMAS, TINY, llama_base, start


def main() -> None:
    """Run the simulation of a folder's job."""
    folder, server = Path(sys.argv[1]), ServerApp()
    job = Job.read(folder)
    base = llama_base((TINY if job.tiny else LLAMAS)["1B"], job.device, torch.bfloat16)
    first = dict(start(base, RANK).tensors())
    del base
    rounds, last = ROUNDS * len(SIZES), [0.0]

    def after(round: int, arrays: ArrayRecord) -> None:
        now = time.perf_counter()
        if round:  # it is also asked before the first
            print(f"round {round}/{rounds} {now - last[0]:.4f}", flush=True)
        last[0] = now

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        everyone = {"min_train_nodes": job.clients, "min_available_nodes": job.clients}
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **everyone)  # type: ignore[arg-type]
        strategy.start(grid, ArrayRecord(first), rounds, evaluate_fn=after)  # type: ignore[arg-type]

    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    gpus = 1.0 if job.device == "cuda" else 0.0
    if gpus:
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray:
        init: dict[str, Any] = {
            "num_cpus": job.actors,
            "num_gpus": gpus,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "_temp_dir": ray,  # short, since Ray makes sockets in it
        }
        resources = {"num_cpus": 1, "num_gpus": gpus / job.actors}
        backend: dict[str, Any] = {"client_resources": resources, "init_args": init}
        run_simulation(server, app(folder), job.clients, backend_config=backend)


if __name__ == "__main__":
    main()
