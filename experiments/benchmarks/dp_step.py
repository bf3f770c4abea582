"""What privacy costs a step of the default job: seconds with it over seconds without, one client and K.

    python experiments/benchmarks/dp_step.py [--repeats 7] [--rows 40] [--strategy ffalora]

Every variant does one local epoch of its clients; they take turns within a repeat, so that a slow spell of
the machine hits both. It prints medians, the median of the ratios within a repeat, and that of the least.
Both train on the same rows: private batches are drawn here as ordinary ones. Noise, clip and the rows'
gradients are the real ones; what a ledger costs is once a round, and not in here.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence

from fedlora.clients import LocalTraining
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.privacy import Mechanism, Source
from fedlora.runner.assemble import Assembly, assemble
from fedlora.training.client import TrainRequest
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit


def work(built: Assembly, clients: int) -> list[TrainRequest]:
    """The first round of so many clients."""
    peers = [built.peer(k, built.ranks[k]) for k in range(clients)]
    tasks = [built.spec.strategy.task(built.start, peer) for peer in peers]
    return [TrainRequest(k, 1, 0, task, built.runtime.rows(k)) for k, task in enumerate(tasks)]


def epoch(built: Assembly, assignments: Sequence[TrainRequest], private: bool) -> None:
    """One local epoch of all of them in one pass."""
    client = built.runtime.client
    assert isinstance(client, LocalTraining)
    jobs = [
        FitJob(
            a.task, client.batches(a), Mechanism(0.7, 1.0, client.batch_size, Source()) if private else None
        )
        for a in assignments
    ]
    fit(built.base, jobs, client.make_optimizer, None, None if private else client.clip, client.micro_tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--strategy", default="ffalora")
    given = parser.parse_args()
    built = assemble(run_spec(compose([f"strategy={given.strategy}", f"data.max_rows={given.rows}"])))
    steps = -(-given.rows // 8)
    for clients in (1, len(built.parts)):
        assignments = work(built, clients)
        runs: dict[str, Callable[[], None]] = {
            "plain": lambda own=assignments: epoch(built, own, False),  # type: ignore[misc]
            "private": lambda own=assignments: epoch(built, own, True),  # type: ignore[misc]
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(given.repeats + 1):
            for name, run in runs.items() if repeat % 2 else reversed(runs.items()):
                began = time.perf_counter()
                run()
                if repeat:  # the first warms up
                    taken[name].append((time.perf_counter() - began) / steps)
        ratios = [p / q for p, q in zip(taken["private"], taken["plain"], strict=True)]
        medians = {name: statistics.median(found) for name, found in taken.items()}
        least = min(taken["private"]) / min(taken["plain"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(
            f"{clients} clients: plain {medians['plain']:.3f} s a step, private {medians['private']:.3f} s, "
            f"ratio {statistics.median(ratios):.3f} (of the least {least:.3f}), peak {peak:.0f} MB"
        )


if __name__ == "__main__":
    main()
