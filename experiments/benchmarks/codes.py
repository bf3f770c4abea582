"""How near a federation comes to its optimum, and for how many bytes, under every code of `compression=`.

    python experiments/benchmarks/codes.py [--rounds 40] [--clients 8] [--seeds 3] [--lr 0.5]

Every message is a real one. A client's model is a least-squares problem: it takes 5 gradient steps on B from
what it was sent, towards a dense weight of its own, under FFA-LoRA. The weights of the clients have a part in
common and a part of their own, and a few of their entries are large. What is reported is the distance of the
server's weight to the best one that its A can express, over that at the start, the geometric mean over seeds.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora.callbacks.base import RunHandle
from fedlora.compression import BF16, NF4, Compression, Int8, RandK, Segments, TopK
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer
from fedlora.data import Example
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.in_process import InProcessGrid
from fedlora.models import Base
from fedlora.rounds.aggregation.choice import aggregation_for
from fedlora.rounds.loop import ServerLoop
from fedlora.rounds.registry import ClientRegistry
from fedlora.rounds.round_config import RoundConfig
from fedlora.seeds import generator
from fedlora.storage.client_state import ClientStore
from fedlora.strategies import FFALoRA
from fedlora.tasks import Classification
from fedlora.training.client import Client, TrainRequest, TrainResult

LAYERS, OUT, IN, RANK = 4, 96, 64, 8
CODES: dict[str, Compression | None] = {
    "none": None,
    "bf16": BF16(),
    "int8": Int8(),
    "nf4": NF4(),
    "nf4, error feedback": NF4(error_feedback=True),
    "topk 0.1": TopK(),
    "topk 0.1, error feedback": TopK(error_feedback=True),
    "topk 0.02": TopK(density=0.02),
    "topk 0.02, error feedback": TopK(density=0.02, error_feedback=True),
    "topk 0.1 in int8, int8 down, error feedback": TopK(values="int8", download="int8", error_feedback=True),
    "randk 0.1": RandK(),
    "randk 0.1, error feedback": RandK(error_feedback=True),
    "segments 4": Segments(),
    "segments 4, error feedback": Segments(error_feedback=True),
}


@dataclass(frozen=True)
class LeastSquares(Client):
    """Gradient steps on ½ ‖s B A − W_k‖² of each layer."""

    seed: int
    lr: float

    def wanted(self, client: int, layer: int) -> torch.Tensor:
        """W_k: the part in common and a part of the client's own, both with a few large entries."""
        found = torch.zeros(OUT, IN, dtype=torch.float64)
        for who, size in ((1000, 1.0), (client, 0.5)):
            rng = generator(self.seed, f"weight {layer}", who)
            found += size * torch.from_numpy(rng.standard_normal((OUT, IN)) ** 3)
        return found

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Five steps a client; A has orthonormal rows, so that one step of 1 would be all it takes."""
        return [TrainResult(self._trained(a), {"loss": 0.0, "steps": 5.0}) for a in assignments]

    def _trained(self, a: TrainRequest) -> Adapter:
        pairs = {}
        for name, pair in a.start.pairs.items():
            A, B = pair.A.double(), pair.B.double()
            for _ in range(5):
                B = B - self.lr * (B @ A - self.wanted(a.client, int(name[-1]))) @ A.T
            pairs[name] = Pair(pair.A, B.float(), pair.scale)
        return Adapter(pairs)

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """Nothing to hold."""
        return 0


def start(seed: int) -> Adapter:
    """A with orthonormal rows, and B = 0."""
    pairs = {}
    for layer in range(LAYERS):
        drawn = torch.from_numpy(generator(seed, f"A {layer}").standard_normal((IN, RANK)))
        A = torch.linalg.qr(drawn).Q.T.contiguous()
        pairs[f"layer.{layer}"] = Pair(A.float(), torch.zeros(OUT, RANK), 1.0)
    return Adapter(pairs)


def federation(
    code: Compression | None, seed: int, clients: int, rounds: int, lr: float
) -> tuple[float, int, int]:
    """The distance at the end over that at the start, and the bytes up and down of all rounds."""
    learner, strategy = LeastSquares(seed, lr), FFALoRA()
    base = Base(torch.nn.Linear(1, 1), None, Classification(), (), "none")
    lines: list[Any] = []
    config = RoundConfig(rounds, seed, evaluate_every=0)
    with tempfile.TemporaryDirectory() as where:
        store = ClientStore(Path(where))
        site = ClientRuntime(base, learner, lambda client: [Example([1], 0)], memory=store, compression=code)
        run = RunHandle(rounds, strategy.init(start(seed)))
        server = ServerLoop(
            strategy,
            run,
            ClientRegistry(Peer, RANK, run.warn),
            config,
            lambda tasks: [(0.0, 0.0) for _ in tasks],
            lambda loss, right: {},
            aggregation=aggregation_for(config, None, (), code),
            compression=code,
        )
        grid = InProcessGrid([site], [{"client": i, "rank": RANK} for i in range(clients)])
        lines = list(server.rounds(grid))
    off, whole = 0.0, 0.0
    for name, pair in server.state.adapter.pairs.items():
        mean = torch.stack([learner.wanted(k, int(name[-1])) for k in range(clients)]).mean(dim=0)
        best = mean @ pair.A.double().T
        off += float((pair.B.double() - best).square().sum())
        whole += float(best.square().sum())
    up, down = (sum(line[f"bytes_{way}"] for line in lines) for way in ("up", "down"))
    return math.sqrt(off / whole), up, down


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.5)
    given = parser.parse_args()
    print("| `compression` | distance left | kB up a message | kB down a message |\n|---|---|---|---|")
    messages = given.clients * given.rounds
    for name, code in CODES.items():
        found = [federation(code, seed, given.clients, given.rounds, given.lr) for seed in range(given.seeds)]
        left = math.exp(sum(math.log(max(f[0], 1e-300)) for f in found) / len(found))
        up, down = (found[0][way] / messages / 1e3 for way in (1, 2))
        print(f"| {name} | {left:.2g} | {up:.2f} | {down:.2f} |", flush=True)


if __name__ == "__main__":
    main()
