"""Seconds a round of the default job: fedlora fused, fedlora one by one, and a bare PEFT loop.

    python experiments/benchmarks/bare_loop.py [--repeats 3] [--rows 240]

The three do the same work, one local epoch of 8 clients at rank 8, and must end in the same factors up to
rounding, which is checked. They take turns within a repeat; the table gives medians and ratios. The loop
is what one writes by hand: one PEFT model, each client's state loaded into it in turn, batches padded to
their own longest row.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedlora.adapter import Adapter, Pair
from fedlora.client import Assignment
from fedlora.data import collate
from fedlora.experiments.build import Job, build
from fedlora.experiments.settings import compose
from fedlora.models import load
from fedlora.protocol import Task

PREFIX = "base_model.model."


def assignments(job: Job) -> list[Assignment]:
    """The first round of every client."""
    return [
        Assignment(node["client"], 1, 0, Task(job.start.adapter), job.site.rows(node["client"]))
        for node in job.nodes()
    ]


def with_fedlora(job: Job, fuse: int) -> list[Adapter]:
    """The round in groups of `fuse` clients."""
    work = assignments(job)
    done = []
    for first in range(0, len(work), fuse):
        done += job.site.client.train(job.base, work[first : first + fuse])
    return [outcome.adapter for outcome in done]


def with_peft(job: Job, model: nn.Module) -> list[Adapter]:
    """The round in a plain loop over one PEFT model."""
    client = job.site.client
    found = []
    for work in assignments(job):
        state = dict(model.named_parameters())
        lora, head = [], []
        for name, pair in work.task.adapter.pairs.items():
            for key, value in (("lora_A", pair.A), ("lora_B", pair.B)):
                state[f"{PREFIX}{name}.{key}.default.weight"].data.copy_(value)
                lora.append(state[f"{PREFIX}{name}.{key}.default.weight"])
        for name, value in work.task.adapter.extra.items():
            module, _, leaf = name.rpartition(".")
            parameter = state[f"{PREFIX}{module}.modules_to_save.default.{leaf}"]
            parameter.data.copy_(value)
            head.append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": lora, "lr": client.lr}, {"params": head, "lr": client.head_lr}], weight_decay=0.0
        )
        for rows in client.batches(work):
            batch = collate(rows, job.base.pad_id)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            nn.functional.cross_entropy(logits, batch.target).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(lora + head, client.clip)
            optimizer.step()
            optimizer.zero_grad()
        pairs = {
            name: Pair(
                state[f"{PREFIX}{name}.lora_A.default.weight"].detach().clone(),
                state[f"{PREFIX}{name}.lora_B.default.weight"].detach().clone(),
                pair.scale,
            )
            for name, pair in work.task.adapter.pairs.items()
        }
        found.append(Adapter(pairs))
    return found


def distance(these: list[Adapter], those: list[Adapter]) -> float:
    """The largest relative difference of a factor."""
    return max(
        float((x - y).norm() / y.norm().clamp_min(1e-12))
        for one, other in zip(these, those, strict=True)
        for name in one.pairs
        for x, y in (
            (one.pairs[name].A, other.pairs[name].A),
            (one.pairs[name].B, other.pairs[name].B),
        )
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=240, help="at most so many rows a client")
    given = parser.parse_args()
    job = build(compose([f"data.max_rows={given.rows}"]))
    plain = load(job.base.path, "classification", job.dataset.labels).model
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(job.start.adapter.pairs), modules_to_save=list(job.base.heads)
    )
    peft = get_peft_model(plain, config).eval()  # eval: no dropout, as in fedlora
    ways: dict[str, Callable[[], list[Adapter]]] = {
        "fedlora, all clients fused": lambda: with_fedlora(job, len(job.parts)),
        "fedlora, one by one": lambda: with_fedlora(job, 1),
        "bare PEFT loop": lambda: with_peft(job, peft),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list[Adapter]] = {}
    for _ in range(given.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - began)
    bare = statistics.median(seconds["bare PEFT loop"])
    print(f"{sum(len(part.rows) for part in job.parts)} rows a round, {torch.get_num_threads()} threads")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        apart = distance(results[name], results["bare PEFT loop"])
        print(f"{name:28} {middle:6.2f} s  {middle / bare:5.2f} of the loop  factors differ by {apart:.1e}")


if __name__ == "__main__":
    main()
