"""Memory of many clients on one base: measured against what the parts need."""

from functools import partial

import torch

from fedlora.core.adapter import Adapter

from .bench import RANK, Bench
from .rows import FIXED, Batches, ordinary, round_of, sixty_four

CLIENTS = 64
ROWS = 64  # rows of 64 tokens in a micro-batch: as many as 16 clients have in a step
BUDGET = ROWS * 64
MARGIN = 1.10
CARD = 80.0  # GB
STATES = 4  # float32 numbers for each of an adapter's: itself, its gradient, and AdamW's two moments


def memory(bench: Bench) -> None:
    """Section 4: the peak of 64 clients of rank 16 at 8B."""
    base, adapter = bench.model("8B")
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters()) / 1e9
    state = STATES * _bytes(adapter) / 1e9
    one = Batches("64 x 64", ROWS, sixty_four)
    peaks = {}
    for clients, batches in ((1, one), (CLIENTS, FIXED)):
        requests = round_of(base, [adapter] * clients, batches, 1, not bench.on_gpu)
        client = ordinary(batches, 1, BUDGET if bench.on_gpu else BUDGET // 16)
        bench.free()
        peaks[clients] = bench.measure(partial(client.train, base, requests))[1]
    activations = max(0.0, peaks[1] - weights - state)
    planned = weights + CLIENTS * state + activations
    title = f"Memory of {CLIENTS} clients of rank {RANK} at 8B, micro-batches of {BUDGET} tokens"
    table = bench.report.table(title, ["part", "GB"])
    table.row("base", weights)
    table.row("adapter, gradient and AdamW's state of one client", state)
    table.row("the same of all clients", CLIENTS * state)
    table.row("activations of a micro-batch, measured with one client", activations)
    table.row("sum", planned)
    table.row(f"peak of {CLIENTS} clients, measured", peaks[CLIENTS])
    table.row("peak over sum", peaks[CLIENTS] / planned)
    judged = bench.judged
    met = peaks[CLIENTS] <= MARGIN * planned
    bench.report.goal(1, f"{CLIENTS} clients at 8B need at most the sum and 10 %", met if judged else None)
    fits = peaks[CLIENTS] <= CARD
    bench.report.goal(1, f"{CLIENTS} clients at 8B fit {CARD:.0f} GB", fits if judged else None)


def _bytes(adapter: Adapter) -> int:
    return sum(tensor.numel() * torch.float32.itemsize for _, tensor in adapter.tensors())
