"""The packaged tiny model in float64, with adapters and rows for it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, LoRA, fresh_adapter, load, targets
from fedlora.models.packaged import tiny
from fedlora.training.client import TrainRequest

PLAIN = LocalTraining(lr=0.1, head_lr=None, batch_size=4, optimizer=partial(torch.optim.SGD), clip=None)


@dataclass
class Bench:
    """A model, and clients that train on it."""

    base: Base
    client = PLAIN

    def start(self, rank: int = 2, seed: int = 0) -> Adapter:
        """An adapter in which every factor has a gradient."""
        shapes = targets(self.base, ["query", "value"])
        adapter = fresh_adapter(self.base, shapes, LoRA().peer(0, rank, shapes), self.base.heads, seed)
        made = torch.Generator().manual_seed(seed)
        pairs = {
            m: replace(p, A=p.A.double(), B=0.05 * torch.randn(p.B.shape, generator=made).double())
            for m, p in adapter.pairs.items()
        }
        return Adapter(pairs, {name: tensor.double() for name, tensor in adapter.extra.items()})

    def rows(self, number: int, seed: int = 0) -> list[Example]:
        rng = np.random.default_rng([seed, 1])
        return [Example(rng.integers(2, 200, 3 + i % 5).tolist(), i % 2) for i in range(number)]

    def work(self, task: Task, client: int = 1, rows: int = 8) -> TrainRequest:
        return TrainRequest(client, 1, 0, task, self.rows(rows, client))

    def train(self, task: Task, client: LocalTraining = PLAIN, **more: Any) -> Adapter:
        """One client's adapter after a round."""
        return client.train(self.base, [self.work(task, **more)])[0].adapter


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        base = load(tiny(), "classification", ("x", "y"))
    base.model.double()
    return Bench(base)
