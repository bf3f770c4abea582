"""Apple's pfl-research: its FederatedAveraging on its SimulatedBackend, in one process or one a core.

    python -m experiments.benchmarks.peers.pfl_sim JOB OUT
    torchrun --standalone --nproc-per-node=2 -m experiments.benchmarks.peers.pfl_sim JOB OUT

Granqvist et al. "pfl-research: simulation framework for accelerating research in Private Federated Learning".
NeurIPS 2024. https://arxiv.org/abs/2404.06430. One model a process, every user's state loaded into it in
turn. Chosen in its favour: alone it has torch's default threads, all cores; by torchrun it has a worker a
core, of one thread each, the users dealt out to them in turn, their updates summed by gloo. No privacy, no
callbacks but the one that tells the time; metrics that cost nothing, since it measures every user before and
after the first round's training. Batches are padded when they are drawn, in fedlora's order.
"""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
from pfl.aggregate.weighting import WeightByDatapoints  # type: ignore[import-not-found]
from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore[import-not-found]
from pfl.callback.base import TrainingProcessCallback  # type: ignore[import-not-found]
from pfl.data.dataset import Dataset  # type: ignore[import-not-found]
from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
from pfl.hyperparam import NNTrainHyperParams  # type: ignore[import-not-found]
from pfl.metrics import Metrics, Weighted  # type: ignore[import-not-found]
from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch import Tensor, nn

from .shared import Job, build, ended, load, optimizer, trained

FIRST = os.environ.get("RANK", "0") == "0"  # the worker that speaks, or the only one


class Model(nn.Module):
    """The PEFT model as pfl wants it: with a loss and metrics."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.inner = build(job)
        load(self.inner, job.start)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch."""
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return nn.functional.cross_entropy(logits, labels)

    def metrics(self, **batch: Any) -> dict[str, Any]:
        """Nothing to speak of, but pfl insists on something."""
        return {"nothing": Weighted(0.0, 1)}


class User(Dataset):  # type: ignore[misc]
    """A client's rows in the batches of one round."""

    def __init__(self, job: Job, client: int, round: int) -> None:
        super().__init__((job.rows[client],), user_id=str(client))
        self._drawn = job, round, client

    def iter(self, batch_size: int | None) -> Iterator[dict[str, Tensor]]:
        """The batches, each padded to its longest row."""
        job, round, client = self._drawn
        for inputs, labels in job.batches(round, client):
            yield {**inputs, "labels": labels}

    def __len__(self) -> int:
        return len(self.raw_data[0])


class Clock(TrainingProcessCallback):  # type: ignore[misc]
    """Tells when a round has ended."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Any]:
        """Say it, and go on."""
        if FIRST:
            ended(central_iteration + 1, self._job)
        return False, Metrics()


def main() -> None:
    """Run the job of a folder, write the final adapter."""
    job = Job.read(Path(sys.argv[1]))
    if len(job.rows) % int(os.environ.get("WORLD_SIZE", "1")):
        sys.exit("pfl's workers would not agree on whose turn it is: the clients must be a multiple of them")
    module, clients, seen = Model(job), len(job.rows), Counter[int]()

    def local(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return optimizer(module.inner, job)

    def user(client: int) -> User:
        seen[client] += 1
        return User(job, client, seen[client])

    users = FederatedDataset(user, itertools.cycle(range(clients)).__next__)
    found = [p for p in module.parameters() if p.requires_grad]
    FederatedAveraging().run(
        NNAlgorithmParams(job.rounds, job.rounds, clients, None),
        SimulatedBackend(users, users, [WeightByDatapoints()]),
        PyTorchModel(module, local, torch.optim.SGD(found, lr=1.0)),
        NNTrainHyperParams(max(map(len, job.orders[0][0])), 1, job.lr, job.clip),
        callbacks=[Clock(job)],
        send_metrics_to_platform=False,
    )
    if FIRST:
        save_file({name: value.detach() for name, value in trained(module.inner).items()}, sys.argv[2])


if __name__ == "__main__":
    main()
