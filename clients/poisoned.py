"""Local training in which a share of the clients is malicious, to study what a run withstands.

    labels   trains on its rows with every label y turned into (y + 1) mod L
    sign     trains, and sends start − boost · (trained − start) of every tensor that it shares
    noise    trains, and sends start + boost · ‖trained − start‖ · z / ‖z‖, z Gaussian, tensor by tensor

Flipped labels: Biggio, Nelson, Laskov, "Poisoning Attacks against Support Vector Machines", ICML 2012,
https://arxiv.org/abs/1206.6389, and Tolpegin et al., ESORICS 2020, https://arxiv.org/abs/2007.08432, for
federated training. Signs and noise: Li, Cheng, Wang, Liu, Chen, "Learning to Detect Malicious Clients for
Robust Federated Learning", 2020, https://arxiv.org/abs/2002.00211.

Attackers who know the defence do better than these: a rule that withstands them is not thereby safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base
from fedlora.ranges import check_number
from fedlora.seeds import generator
from fedlora.training.client import Client, TrainRequest, TrainResult
from fedlora.training.rules.base import LocalRule

from .local import LocalTraining


@dataclass(frozen=True)
class PoisonedTraining(Client):
    """Local training for honest clients, and the same with an attack on it for the others.

    Args:
        local: what honest clients do.
        kind: the attack.
        share: of the clients that is malicious, from 0 to 1; which ones follows from the run's seed.
        clients: how many there are.
        boost: how far "sign" and "noise" go, in lengths of the honest change.
    """

    local: LocalTraining
    kind: Literal["labels", "sign", "noise"]
    share: float
    clients: int
    boost: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("labels", "sign", "noise"):
            raise ConfigError(f"client.kind: expected labels, sign or noise, got '{self.kind}'")
        check_number("client.share", self.share, least=0, most=1)
        if not (isinstance(self.clients, int) and self.clients >= 1):
            raise ConfigError(
                f"client.clients: expected how many there are, got {self.clients}; say clients=N"
            )
        check_number("client.boost", self.boost, above=0)

    @classmethod
    def of(
        cls,
        kind: Literal["labels", "sign", "noise"],
        share: float,
        clients: int,
        boost: float = 1.0,
        **local: Any,
    ) -> "PoisonedTraining":
        """As a configuration says it: the settings of `LocalTraining` beside its own."""
        return cls(LocalTraining(**local), kind, share, clients, boost)

    def malicious(self, seed: int) -> frozenset[int]:
        """The ids of the malicious clients, the share of all to the nearest whole, by the run's seed."""
        order = generator(seed, "poisoned").permutation(self.clients)
        return frozenset(int(client) for client in order[: round(self.share * self.clients)])

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Local training of all in one pass, and the attacks on the way in or out."""
        labels = int(base.model.config.num_labels) if base.task.labelled else 0
        if self.kind == "labels" and not labels:
            raise ConfigError("client.kind: 'labels' needs a classification task; use sign or noise")
        bad = [a.client in self.malicious(a.seed) for a in assignments]
        given = [
            replace(a, rows=_flipped(a.rows, labels)) if evil and self.kind == "labels" else a
            for a, evil in zip(assignments, bad, strict=True)
        ]
        outcomes = self.local.train(base, given)
        if self.kind == "labels":
            return outcomes
        return [
            replace(outcome, adapter=self._turned(a, outcome.adapter)) if evil else outcome
            for a, outcome, evil in zip(assignments, outcomes, bad, strict=True)
        ]

    def evaluate(self, base: Base, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        """As in local training."""
        return self.local.evaluate(base, assignments)

    def with_rules(self, rules: Sequence[LocalRule]) -> "PoisonedTraining":
        """The same with rules in its local training."""
        return replace(self, local=self.local.with_rules(rules))

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """As many as in local training."""
        return self.local.step_tokens(rows)

    @property
    def other_than_sgd(self) -> str | None:
        """As in local training."""
        return self.local.other_than_sgd

    @property
    def micro_tokens(self) -> int | None:
        """As in local training."""
        return self.local.micro_tokens

    def _turned(self, assignment: TrainRequest, trained: Adapter) -> Adapter:
        """The trained adapter with the attack on all that is shared."""
        rng = generator(assignment.seed, "poison", assignment.client, assignment.round)
        start, tensors = dict(assignment.start.tensors()), dict(trained.tensors())

        def sent(name: str) -> Tensor:
            tensor = tensors[name]
            old = start[name][tuple(slice(0, n) for n in tensor.shape)]  # a pruned rank has fewer
            way: Tensor = old - tensor
            if self.kind == "noise":
                z = torch.from_numpy(rng.standard_normal(tuple(tensor.shape))).to(tensor)
                way = z * (way.norm() / z.norm())
            return old.add(way, alpha=self.boost)

        return trained.with_tensors({name: sent(name) for name in assignment.task.shared()})


def _flipped(rows: Sequence[Example], labels: int) -> list[Example]:
    """The rows with other labels."""
    return [replace(row, target=(row.target + 1) % labels) for row in rows]
