"""Local training by a torch optimizer: the ordinary client of federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. "Communication-Efficient Learning of Deep Networks from
Decentralized Data". AISTATS 2017. https://arxiv.org/abs/1602.05629

A client goes through its own rows in seeded order, `epochs` times or for `steps` batches, with an optimizer
that starts anew each round: after the server has combined factors, old moments point nowhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedlora.client import Assignment, Client, Outcome
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base
from fedlora.seeds import generator
from fedlora.trainer import Job, Parameters, fit


@dataclass(frozen=True)
class LocalTraining(Client):
    """E epochs, or so many steps, of minibatch training of the factors and the head.

    Args:
        lr: learning rate of A and B.
        head_lr: learning rate of the head; None takes `lr`.
        batch_size: rows a step.
        epochs: passes over the client's rows a round.
        steps: so many steps a round instead, going round the rows as often as needed.
        optimizer: from parameter groups to an optimizer, such as a partial of `torch.optim.AdamW`.
        clip: largest gradient norm over all that a client trains; None does not clip.
        schedule: "constant", "linear" or "cosine" decay to zero over the client's own steps of a round.
        warmup: share of the steps in which the rate rises from zero.
        micro_tokens: padded tokens a micro-batch holds at most; speed and memory, not the result.
    """

    lr: float
    head_lr: float | None = None
    batch_size: int = 8
    epochs: int = 1
    steps: int | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    clip: float | None = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    micro_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "steps", "micro_tokens"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"client.{name}: expected a whole number of at least 1, got {value!r}")
        for name in ("lr", "head_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"client.{name}: expected a number above 0, got {value!r}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"client.schedule: expected constant, linear or cosine, got '{self.schedule}'")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"client.warmup: expected a share from 0 to 1, got {self.warmup}")

    def train(self, base: Base, assignments: Sequence[Assignment]) -> list[Outcome]:
        """Train all assignments in one pass."""
        jobs = [Job(a.task.adapter, self.batches(a), a.task.train) for a in assignments]
        fitted = fit(base, jobs, self._make_optimizer, self._factor, self.clip, self.micro_tokens)
        return [Outcome(f.adapter, {"loss": f.loss, "steps": float(f.steps)}) for f in fitted]

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """Rows of a step times the mean length of a row."""
        if not rows:
            return 0
        return math.ceil(min(self.batch_size, len(rows)) * sum(len(r.input_ids) for r in rows) / len(rows))

    def batches(self, assignment: Assignment) -> list[list[Example]]:
        """The round's batches, a new order each pass; the last of a pass may be smaller."""
        rng = generator(assignment.seed, "batches", assignment.client, assignment.round)
        rows, found = assignment.rows, list[list[Example]]()
        per_epoch = math.ceil(len(rows) / self.batch_size)
        wanted = self.steps if self.steps is not None else per_epoch * self.epochs
        while rows and len(found) < wanted:
            order = rng.permutation(len(rows))
            found += [
                [rows[i] for i in order[start : start + self.batch_size]]
                for start in range(0, len(rows), self.batch_size)
            ]
        return found[:wanted]

    def _make_optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        rates = {"A": self.lr, "B": self.lr, "head": self.head_lr or self.lr}
        groups: list[dict[str, Any]] = [{"params": found, "lr": rates[n]} for n, found in parameters.items()]
        return self.optimizer(groups)

    def _factor(self, step: int, steps: int) -> float:
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1.0, steps - rising)
        shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return shapes[self.schedule]
