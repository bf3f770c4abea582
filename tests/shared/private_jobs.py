"""Private clients of small models: their jobs, their training, and whether two results are alike."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, targets
from fedlora.privacy import Mechanism, Source
from fedlora.training.steps import FitJob
from fedlora.training.trainer import FitResult, fit

CLIENT = LocalTraining(lr=0.05, optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.5), clip=None)


def rows(base: Base, count: int, seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, 60, (2 + (5 * i + seed) % 9,), generator=draw).tolist()
        found.append(Example(ids, i % 3 if base.heads else [-100, *ids[1:]]))
    return found


def job(base: Base, seed: int, rank: int, batches: Sequence[int], sigma: float = 0.7, **more: Any) -> FitJob:
    draw = torch.Generator().manual_seed(seed)
    dtype = base.model.dtype
    pairs = {
        n: Pair(
            0.3 * torch.randn(rank, i, generator=draw, dtype=dtype),
            0.3 * torch.randn(o, rank, generator=draw, dtype=dtype),
            1 / (1 + seed),
        )
        for n, (o, i) in targets(base, "all-linear").items()
    }
    task = Task(Adapter(pairs, {n: p.to(dtype) for n, p in base.head_state().items()}), **more)
    mechanism = Mechanism(sigma * (1 + seed), 0.3 + seed / 10, 3 + seed, Source(f"client {seed}"))
    return FitJob(task, [rows(base, size, 10 * seed + at) for at, size in enumerate(batches)], mechanism)


# Of several ranks, batches and numbers of steps: some are empty, one client has nothing else, one no step.
CLIENTS: tuple[tuple[int, Sequence[int]], ...] = (
    (3, (4, 0, 2)),
    (16, (0, 5)),
    (1, (2, 6, 1)),
    (8, (0,)),
    (2, ()),
)


def jobs(base: Base, sigma: float = 0.7, **more: Any) -> list[FitJob]:
    return [job(base, seed, rank, sizes, sigma, **more) for seed, (rank, sizes) in enumerate(CLIENTS)]


def trained(base: Base, work: Sequence[FitJob], client: LocalTraining = CLIENT) -> list[FitResult]:
    return fit(base, work, client.make_optimizer, client.rate_factor, None, client.micro_tokens)


def compare(one: FitResult, other: FitResult, tol: float) -> None:
    assert math.isclose(one.loss, other.loss, rel_tol=tol, abs_tol=tol)
    assert one.steps == other.steps
    assert one.clipped == other.clipped
    mine, theirs = dict(one.adapter.tensors()), dict(other.adapter.tensors())
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
        )
