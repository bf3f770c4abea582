"""The client of FedMS: ordinary training of the global expert, then a gate over it and an expert of its own.

Wu, Li, Wang, Wang. "FedMS: Federated Learning with Mixture of Sparsely Activated Foundations Models". 2023.
https://arxiv.org/abs/2312.15926

With both experts' logits g and l, and h what goes into the topmost adapted layer of the frozen global expert,

    y = p_0 g + p_1 l,    p = softmax(B_g A_g [h; 1])

One p a row for a classifier, of the mean of h over the row's tokens; one p a token for a decoder, of the
token's own h, which knows nothing of later tokens. The loss is that of y; the gate and the local expert learn
together.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base, HiddenStateHook, MultiAdapterModel
from fedlora.training.client import Client, TrainRequest, TrainResult
from fedlora.training.evaluation import measure
from fedlora.training.expert import GlobalExpert

from .local import LocalTraining

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GatedExperts(Client):
    """A gate between the global expert and a local one, where the task brings an expert; else as `local`.

    The local expert starts as the global one, trains every round the modules that are not frozen, and stays
    in the client's memory.

    Args:
        local: the optimizer, rates and batches of both stages; the gate learns at its `lr`.
    """

    local: LocalTraining

    @classmethod
    def of(cls, **local: Any) -> "GatedExperts":
        """As a configuration says it: the settings of `LocalTraining`."""
        return cls(LocalTraining(**local))

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Tasks without an expert in one pass, those with one client by client."""
        plain = [a for a in assignments if a.task.part(GlobalExpert) is None]
        found = dict(zip(map(id, plain), self.local.train(base, plain) if plain else (), strict=True))
        return [found[id(a)] if id(a) in found else self._mix(base, a) for a in assignments]

    def evaluate(self, base: Base, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        """Loss and share of right answers of the mixture; of the adapter alone where there is no expert."""
        plain = [a for a in assignments if a.task.part(GlobalExpert) is None]
        found = dict(zip(map(id, plain), self.local.evaluate(base, plain) if plain else (), strict=True))
        for a in assignments:
            if id(a) not in found:
                with Mixture(base, a) as mixture:
                    found[id(a)] = measure(base, mixture.scores, a.rows, self.micro_tokens)
        return [found[id(a)] for a in assignments]

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """As many as in local training."""
        return self.local.step_tokens(rows)

    @property
    def micro_tokens(self) -> int | None:
        """As in local training."""
        return self.local.micro_tokens

    def _mix(self, base: Base, assignment: TrainRequest) -> TrainResult:
        with Mixture(base, assignment, train=True) as mixture:
            loss, steps = self.local.descend(
                base,
                mixture.parameters,
                lambda rows: mixture.scores(rows)[0],
                self.local.batches(assignment),
                self.local.round_rate(assignment),
            )
            return TrainResult(mixture.gate, {"loss": loss, "steps": float(steps)}, mixture.memory())


class Mixture:
    """Both experts on one model and the gate between them, for use in a `with` block.

    Args:
        base: the frozen model.
        assignment: whose task brings the gate and the global expert; its memory the local one, or nothing.
        train: whether gradients reach the gate and the local expert.

    Raises:
        ConfigError: the global expert has no pair, so that the gate has nothing to look at.
    """

    def __init__(self, base: Base, assignment: TrainRequest, train: bool = False) -> None:
        task, mixed = assignment.task, assignment.task.part(GlobalExpert)
        if mixed is None or not mixed.adapter.pairs:
            raise ConfigError("FedMS needs LoRA pairs, for its gate to look at; name some lora.targets")
        expert, own = mixed.adapter, _local(mixed.adapter, assignment.memory)
        self._base, self._open = base, ExitStack()
        self._bank = MultiAdapterModel(
            base,
            [
                Task(expert, NOBODY, base_delta=task.base_delta),
                Task(own, frozen=mixed.frozen, base_delta=task.base_delta),
            ],
            train,
            every_token=True,
        )
        self._tap = HiddenStateHook(base, expert.top_down()[0])
        gate = {n: nn.Parameter(t.to(base.device, copy=True), train) for n, t in task.adapter.extra.items()}
        self._A, self._B = gate["gate.A"], gate["gate.B"]
        self.parameters = {**self._bank.factors(1), "gate": [self._A, self._B]}

    def __enter__(self) -> Self:
        self._open.enter_context(self._bank)
        self._open.enter_context(self._tap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def gate(self) -> Adapter:
        """A copy of the gate's adapter as it now is."""
        return Adapter({}, {"gate.A": self._A.detach().clone(), "gate.B": self._B.detach().clone()})

    def memory(self) -> dict[str, Tensor]:
        """A copy of the local expert as it now is, as a client keeps it."""
        return {f"local/{name}": tensor for name, tensor in self._bank.adapter(1).tensors()}

    def scores(self, rows: list[Example]) -> tuple[Tensor, Tensor]:
        """One loss a row and one share of right answers a row, both (rows,)."""
        batch = self._base.collate(rows)
        with torch.no_grad():
            self._bank.route([len(rows), 0])
            common = self._base.logits(batch)
            mask = batch.inputs["attention_mask"].to(self._base.device)
            h = self._tap.states() if self._base.task.per_token else self._tap.pooled(mask)
        self._bank.route([0, len(rows)])
        own = self._base.logits(batch)
        h = h.to(self._A)
        p = (torch.cat([h, torch.ones_like(h[..., :1])], -1) @ self._A.T @ self._B.T).softmax(-1).to(own)
        return self._base.scores(p[..., :1] * common + p[..., 1:] * own, batch)


def _local(expert: Adapter, memory: Mapping[str, Tensor]) -> Adapter:
    """The client's own expert: the global one, with the tensors that the client has kept."""
    return expert.with_tensors({n: memory.get(f"local/{n}", tensor) for n, tensor in expert.tensors()})
