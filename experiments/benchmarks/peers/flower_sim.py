"""Flower's own simulation on Ray, with its FedAvg and a ClientApp of plain transformers and PEFT.

    python -m experiments.benchmarks.peers.flower_sim JOB OUT [--cached]

As Flower's examples for language models do, the ClientApp makes its model anew for every message; with
`--cached` an actor makes it once and keeps it in its process. Chosen in Flower's favour: as many actors as
cores, with one CPU and one torch thread each; a torch loop in place of transformers' Trainer; no evaluation
messages; no dashboard; no logs; `run_simulation`, which needs no SuperLink process as `flwr run` does (26 s
for a trivial app on this machine).
"""

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import save_file

from .flower_client import app
from .shared import Job, ended


def main() -> None:
    """Run the job of a folder, write the final adapter."""
    folder, out, cached = Path(sys.argv[1]), sys.argv[2], "--cached" in sys.argv
    job = Job.read(folder)
    clients, server = len(job.rows), ServerApp()
    final: dict[str, Any] = {}

    def after(round: int, arrays: ArrayRecord) -> None:
        if round:  # it is also asked before the first
            ended(round, job)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        everyone = {"min_train_nodes": clients, "min_available_nodes": clients}
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **everyone)  # type: ignore[arg-type]
        result = strategy.start(grid, ArrayRecord(job.start), job.rounds, evaluate_fn=after)  # type: ignore[arg-type]
        final.update(result.arrays.to_torch_state_dict())

    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    actors = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray:
        init: dict[str, Any] = {
            "num_cpus": actors,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "_temp_dir": ray,  # short, since Ray makes sockets in it
        }
        backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": init}
        run_simulation(server, app(folder, cached), clients, backend_config=backend)
    save_file({name: final[name] for name in job.start}, out)


if __name__ == "__main__":
    main()
