"""Where the seconds of a round go: training, evaluation, the framework; and within training, by kind of work.

    python experiments/benchmarks/profile_round.py [--rounds 3] [KEY=VALUE ...]

The default job, or another by the words of `fedlora run`. The first table is of the rounds after the first,
as they run. The second is of one more pass of training by one thread under torch's profiler, whose own cost
is in the last line: everything that is no operation of torch, such as Python.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the fedlora command does

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from fedlora.cli import run_job
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.core.messages import Task
from fedlora.report import read_run
from fedlora.runner.assemble import Assembly, assemble
from fedlora.training.client import Client, TrainRequest

KINDS = {  # the first that an operation's name holds
    "matrix products": ("mm", "linear"),
    "attention": ("scaled_dot_product", "softmax"),
    "activations and norms": ("gelu", "silu", "layer_norm", "rms", "rsqrt", "tanh"),
    "copies and indexing": ("copy", "index", "cat", "fill", "zero", "clone", "embedding", "gather"),
    "optimizers": ("Optimizer", "lerp", "addcdiv", "addcmul", "sqrt", "norm"),
}


class Clock:
    """Seconds spent in functions that it wraps."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def call(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **named)
            finally:
                self.spent.append(time.perf_counter() - began)

        return call


def rounds(words: list[str], count: int) -> dict[str, float]:
    """Medians over the rounds after the first: seconds in all, of training, and of evaluation."""
    training, evaluation = Clock(), Clock()
    made = compose([*words, f"rounds={count}"])
    with tempfile.TemporaryDirectory() as folder:
        made.out = f"{folder}/run"
        client: type[Client] = type(assemble(run_spec(made)).runtime.client)
        train, evaluate = client.train, Assembly.evaluate
        client.train, Assembly.evaluate = training.timed(train), evaluation.timed(evaluate)  # type: ignore[method-assign]
        try:
            path = run_job.run_job(made, Console())
        finally:
            client.train, Assembly.evaluate = train, evaluate  # type: ignore[method-assign]
        seconds = [line["seconds"] for line in read_run(path).metrics]
    calls = len(training.spent) // count  # a round trains all its clients in so many calls
    trained = [sum(training.spent[i * calls : (i + 1) * calls]) for i in range(count)]
    evaluated = evaluation.spent[1:] or [0.0] * count  # the first is of the model before round 1
    return {
        "round": statistics.median(seconds[1:]),
        "training": statistics.median(trained[1:]),
        "evaluation": statistics.median(evaluated[-count + 1 :]),
    }


def kinds(words: list[str]) -> dict[str, float]:
    """Seconds of one pass of training by one thread, by kind of operation; and all of it."""
    torch.set_num_threads(1)
    job = assemble(run_spec(compose(words)))
    work = [
        TrainRequest(node["client"], 1, 0, Task(job.start.adapter), job.runtime.rows(node["client"]))
        for node in job.nodes()
    ]
    job.runtime.client.train(job.base, work)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        job.runtime.client.train(job.base, work)
        whole = time.perf_counter() - began
    found = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in seen.key_averages():
        names = (kind for kind, parts in KINDS.items() if any(part in event.key for part in parts))
        found[next(names, "other operations")] += event.self_cpu_time_total / 1e6
    return {**found, "outside of operations": max(0.0, whole - sum(found.values())), "all": whole}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    found = rounds(given.words, given.rounds)
    rest = found["round"] - found["training"] - found["evaluation"]
    print("\n| of a round | s | share |\n|---|--:|--:|")
    for name, seconds in (*found.items(), ("framework", rest)):
        print(f"| {name} | {seconds:.2f} | {seconds / found['round']:.1%} |")
    passed = kinds(given.words)
    print("\n| of training, one thread | s | share |\n|---|--:|--:|")
    for name, seconds in passed.items():
        print(f"| {name} | {seconds:.2f} | {seconds / passed['all']:.1%} |")


if __name__ == "__main__":
    main()
