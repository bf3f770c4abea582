"""What the framework costs beside training: milliseconds a message, in one process.

    python experiments/benchmarks/messages.py [--clients 100] [--rounds 5] [--secure]

Every client answers at once with what it was sent; all that is left is sampling, records, checks, aggregation
by FedIT, certificate, logs and checkpoints. MiniLM-sized factors: 12 modules of 384 x 384 at rank 8.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fedlora.callbacks.base import RunHandle
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer
from fedlora.data import Example
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.in_process import InProcessGrid
from fedlora.models import Base
from fedlora.rounds.loop import ServerLoop
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round_config import RoundConfig
from fedlora.storage.run_folder import RunFolder
from fedlora.strategies import FedIT
from fedlora.tasks import Classification
from fedlora.training.client import Client, TrainRequest, TrainResult


class Echo(Client):
    """Answers with the adapter that it was sent."""

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """No training."""
        return [TrainResult(a.task.adapter, {"loss": 0.0, "steps": 0.0}) for a in assignments]

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """Nothing to hold."""
        return 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secure", action="store_true", help="under masks, so that the server sees a sum")
    given = parser.parse_args()
    base = Base(torch.nn.Linear(1, 1), None, Classification(), (), "none")
    site = ClientRuntime(base, Echo(), lambda client: [Example([1], 0)])
    pairs = {f"layer.{i}": Pair(torch.randn(8, 384), torch.randn(384, 8), 2.0) for i in range(12)}
    strategy = FedIT()
    nodes = [{"client": i, "rank": 8} for i in range(given.clients)]
    with tempfile.TemporaryDirectory() as where:
        folder = RunFolder.create(Path(where) / "run", "")
        run = RunHandle(given.rounds, strategy.init(Adapter(pairs)))
        server = ServerLoop(
            strategy,
            run,
            ClientRegistry(Peer, 8, run.warn),
            RoundConfig(given.rounds, 0, evaluate_every=0, secure_sum=given.secure),
            lambda tasks: [(0.0, 0.0) for _ in tasks],
            lambda loss, right: {},
            folder,
        )
        began = time.perf_counter()
        server.run(InProcessGrid([site], nodes))
        taken = time.perf_counter() - began
        down, up = (folder.rounds()[0][f"bytes_{way}"] / given.clients for way in ("down", "up"))
    messages = given.clients * given.rounds
    print(
        f"{messages} messages of {down / 1e3:.0f} kB down and {up / 1e3:.0f} kB up in {taken:.2f} s: "
        f"{1e3 * taken / messages:.2f} ms a message, {taken / given.rounds:.2f} s a round"
    )


if __name__ == "__main__":
    main()
