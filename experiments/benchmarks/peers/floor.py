"""The least time that a round could take: its floating-point operations over the machine's peak rate.

Started as a program it prints the rates of fp32 matrix products as JSON, in GFLOP/s: of MiniLM's own shape
(384×384 times 512 tokens) in two processes of one thread each, or as many as there are cores, and of a large
one on all cores.
"""

import json
import multiprocessing
import os
import time
from dataclasses import dataclass

import torch

from .shared import Job

SECONDS = 1.5  # of each measurement, after a warm-up


def rate(shape: tuple[int, int, int], threads: int) -> float:
    """GFLOP/s of products of these sizes, the best of three windows."""
    torch.set_num_threads(threads)
    m, k, n = shape
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    best = 0.0
    for window in (0.3, *[SECONDS / 3] * 3):
        began, done = time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < window:
            for _ in range(4):
                torch.mm(left, right, out=out)
            done += 4
        best = max(best, 2e-9 * m * k * n * done / taken)
    return best


def _alone(shape: tuple[int, int, int]) -> float:
    return rate(shape, 1)


def rates() -> dict[str, float]:
    """Both rates of this machine."""
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        narrow = sum(pool.map(_alone, [(384, 384, 512)] * cores, chunksize=1))
    return {"384x384x512, a thread a core": narrow, "2048x2048x2048, all cores": rate((2048,) * 3, cores)}


@dataclass(frozen=True)
class Encoder:
    """The sizes of a BERT encoder with a pooler and a linear head.

    Args:
        width: of the hidden state.
        inner: of the feed-forward part.
        layers: how many.
    """

    width: int
    inner: int
    layers: int

    @classmethod
    def of(cls, job: Job) -> "Encoder":
        """That of a job's model."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(job.model)
        return cls(config.hidden_size, config.intermediate_size, config.num_hidden_layers)

    def operations(self, tokens: int, rank: int, labels: int) -> float:
        """FLOPs of a row's forward and backward, LoRA on query and value; nothing that nobody needs.

        The head reads the first token of the last layer, which so needs keys and values of every token, and
        all else of one. The backward pass has no weight gradients of the frozen base, and ends in the first
        layer at the adapters: no gradient of its input, none of its keys.
        """
        d, T = self.width, tokens
        one = 2 * (2 * d * d + 2 * d * self.inner)  # query, output and feed-forward of a token
        linear, attention, lora = T * (one + 4 * d * d), 4 * T * T * d, 8 * T * d * rank
        last = one + T * 4 * d * d + 4 * T * d + 4 * (T + 1) * d * rank
        forward: float = (self.layers - 1) * (linear + attention + lora) + last
        backward: float = (self.layers - 2) * (linear + 2 * attention + 2 * lora) + last + 4 * T * d
        backward += 4 * (T + 1) * d * rank
        backward += 2 * T * (d * d + 2 * d * self.inner) + 1.5 * attention + 1.5 * lora
        head = 2 * d * d + 2 * d * labels
        return forward + backward + head + 2 * d * d + 4 * d * labels


def operations(job: Job) -> float:
    """FLOPs of a round of one epoch, without padding, optimizers and everything that is no matrix product."""
    encoder = Encoder.of(job)
    return sum(encoder.operations(len(ids), job.rank, job.labels) for rows in job.rows for ids, _ in rows)


if __name__ == "__main__":
    print(json.dumps(rates()))
