"""A plain PEFT loop: one process, one model, the clients one after the other, FedAvg of A, B and the heads.

    python -m experiments.benchmarks.peers.bare JOB OUT

Nothing else is done: no messages, no checkpoints, no records. Torch has its default threads, all cores.
AdamW is torch's default, as in fedlora; its fused form for CPUs would save 0.6 of some 40 ms of a step.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from .shared import Job, build, ended, load, train, trained


def main() -> None:
    """Run the job of a folder, write the final adapter."""
    job = Job.read(Path(sys.argv[1]))
    model, state = build(job), job.start
    total = sum(map(len, job.rows))
    for round in range(1, job.rounds + 1):
        mean = {name: torch.zeros_like(value) for name, value in state.items()}
        for client, rows in enumerate(job.rows):
            load(model, state)
            train(model, job, round, client)
            for name, value in trained(model).items():
                mean[name].add_(value.detach(), alpha=len(rows) / total)
        state = mean
        ended(round, job)
    save_file(state, sys.argv[2])


if __name__ == "__main__":
    main()
