"""The client of pFedLoRA: a local model on a base of its own, and a small shared adapter beside it.

Yi, Yu, Wang, Liu, Li. "pFedLoRA: Model-Heterogeneous Personalized Federated Learning with LoRA Tuning". 2023.
https://arxiv.org/abs/2310.13283

With h(x) the mean of the local model's last hidden states over a row's tokens, the two predictions are

    ŷ_ω = local model(x),    ŷ_θ = s B A P h(x),    θ = (A, B) shared, ω = (LoRA, head) the client's own

P takes the width of the client's model to the common one. It is drawn from the run's seed, the same for all
models of one width, has orthonormal rows (columns, where the model is narrower), and is never trained: the
mean of A is one of maps from the same input only if nobody moves that input. A round is

    1. θ frozen: train ω with μ ℓ(ŷ_θ, y) + (1 − μ) ℓ(ŷ_ω, y)
    2. ω frozen: train θ with ℓ(ŷ_θ, y)

each over the round's batches. The personal model's prediction is μ softmax(ŷ_θ) + (1 − μ) softmax(ŷ_ω).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ModelError
from fedlora.models import Base, HiddenStateHook, LoRA, MultiAdapterModel, fresh_adapter, targets
from fedlora.ranges import check_number, check_whole
from fedlora.seeds import generator
from fedlora.training.client import Client, TrainRequest, TrainResult
from fedlora.training.evaluation import measure

from .local import LocalTraining

SHARED = "shared"  # the name of θ's pair


@dataclass(frozen=True)
class TwoPhase(Client):
    """Train one's own model with the shared adapter frozen, then the shared adapter with one's own frozen.

    Classification only. Clients train one by one, each on its own base.

    Args:
        local: the optimizer, rates and batches of both phases.
        mu: μ, how much the adapter's prediction counts beside the local one, from 0 to 1.
        width: of the adapter's input, common to all models.
        rank: of the client's own LoRA pairs.
        targets: the modules that they adapt, as `lora.targets` says them.
    """

    local: LocalTraining
    mu: float = 0.5
    width: int = 64
    rank: int = 8
    targets: Sequence[str] | str = "all-linear"

    def __post_init__(self) -> None:
        check_number("client.mu", self.mu, least=0, most=1, what="share")
        check_whole("client.width", self.width)
        check_whole("client.rank", self.rank)

    @classmethod
    def of(cls, mu: float, width: int, rank: int, targets: Any, **local: Any) -> "TwoPhase":
        """As a configuration says it: the settings of `LocalTraining` beside its own."""
        return cls(LocalTraining(**local), mu, width, rank, targets)

    def shared(self, base: Base) -> dict[str, tuple[int, int]]:
        """θ: from the common width to the labels.

        Raises:
            ModelError: the model does not classify.
        """
        if not base.task.labelled:
            raise ModelError(
                f"pFedLoRA shares an adapter between features and labels, '{base.path}' is to learn the task "
                f"{base.task.name}; use data with labels, or strategy=fedsalora for personal decoders"
            )
        return {SHARED: (int(base.model.config.num_labels), self.width)}

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Both phases, client by client."""
        return [self._train(base, assignment) for assignment in assignments]

    def evaluate(self, base: Base, assignments: Sequence[TrainRequest]) -> list[tuple[float, float]]:
        """Loss and share of right answers of the two predictions together, weighted by μ."""
        found = []
        for assignment in assignments:
            with self.personal(base, assignment) as model:
                found.append(measure(base, model.scores, assignment.rows, self.micro_tokens))
        return found

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """As many as in local training."""
        return self.local.step_tokens(rows)

    @property
    def micro_tokens(self) -> int | None:
        """As in local training."""
        return self.local.micro_tokens

    def personal(self, base: Base, assignment: TrainRequest, train: bool = False) -> "Personal":
        """The client's model as it is before it trains; gradients reach it if `train`."""
        modules = targets(base, self.targets if isinstance(self.targets, str) else list(self.targets))
        peer = LoRA().peer(assignment.client, self.rank, modules)
        fresh = fresh_adapter(base, modules, peer, base.heads, assignment.seed)
        return Personal(base, assignment, fresh, self.mu, train)

    def _train(self, base: Base, assignment: TrainRequest) -> TrainResult:
        batches, rate = self.local.batches(assignment), self.local.round_rate(assignment)
        with self.personal(base, assignment, train=True) as model:
            loss, steps = model.first(self.local, batches, rate)
            after, _ = model.second(self.local, batches, rate)
            told = {"loss": loss, "adapter_loss": after, "steps": float(steps)}
            return TrainResult(model.theta(), told, model.memory())


class Personal:
    """A client's local model ω with the shared adapter θ beside it, for use in a `with` block.

    Args:
        base: the client's frozen base.
        assignment: whose task brings θ; its memory ω, or nothing.
        fresh: where ω's pairs and head start.
        mu: μ.
        train: whether gradients reach ω.
    """

    def __init__(self, base: Base, assignment: TrainRequest, fresh: Adapter, mu: float, train: bool) -> None:
        pair, memory = assignment.task.adapter.pairs[SHARED], assignment.memory
        self._P = _projection(assignment.seed, pair.shape[1], base).to(base.device)
        self._base, self._mu, self._scale, self._open = base, mu, pair.scale, ExitStack()
        self._A, self._B = (nn.Parameter(t.to(base.device, copy=True)) for t in (pair.A, pair.B))
        own = Task(_own(fresh, memory))
        self._bank, self._tap = MultiAdapterModel(base, [own], train, every_token=True), HiddenStateHook(base)

    def __enter__(self) -> Self:
        self._open.enter_context(self._bank)
        self._open.enter_context(self._tap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def first(
        self, local: LocalTraining, batches: Sequence[Sequence[Example]], rate: float
    ) -> tuple[float, int]:
        """Phase 1, of ω; θ stays as it is, bit for bit. The mean loss over the steps, and their number."""

        def losses(rows: list[Example]) -> Tensor:
            logits, h, target = self._pass(rows)
            beside = self._beside(h)
            adapted, own = (F.cross_entropy(found, target, reduction="none") for found in (beside, logits))
            return self._mu * adapted + (1 - self._mu) * own

        return local.descend(self._base, self._bank.factors(0), losses, batches, rate)

    def second(
        self, local: LocalTraining, batches: Sequence[Sequence[Example]], rate: float
    ) -> tuple[float, int]:
        """Phase 2, of θ; ω stays as it is, bit for bit. The mean loss over the steps, and their number."""

        def losses(rows: list[Example]) -> Tensor:
            with torch.no_grad():
                _, h, target = self._pass(rows)
            beside = self._beside(h)
            return F.cross_entropy(beside, target, reduction="none")

        return local.descend(self._base, {"A": [self._A], "B": [self._B]}, losses, batches, rate)

    def scores(self, rows: list[Example]) -> tuple[Tensor, Tensor]:
        """One loss a row and one share of right answers a row, both (rows,), of both predictions together."""
        logits, h, target = self._pass(rows)
        beside = self._beside(h)
        share = torch.tensor([self._mu, 1 - self._mu]).to(logits).log()
        both = torch.logaddexp(beside.log_softmax(-1) + share[0], logits.log_softmax(-1) + share[1])
        return F.nll_loss(both, target, reduction="none"), (both.argmax(-1) == target).to(both.dtype)

    def theta(self) -> Adapter:
        """A copy of the shared adapter as it now is."""
        A, B = self._A.detach().clone(), self._B.detach().clone()
        return Adapter({SHARED: Pair(A, B, self._scale)})

    def memory(self) -> dict[str, Tensor]:
        """A copy of ω as it now is, as a client keeps it."""
        return {f"local/{name}": tensor for name, tensor in self._bank.adapter(0).tensors()}

    def _pass(self, rows: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """The local model's logits, its pooled features h and the targets of a micro-batch."""
        batch = self._base.collate(rows)
        logits = self._base.logits(batch)
        h = self._tap.pooled(batch.inputs["attention_mask"].to(self._base.device))
        return logits, h.to(self._P), batch.target.to(self._base.device)

    def _beside(self, h: Tensor) -> Tensor:
        """ŷ_θ = s B A P h, (rows, labels)."""
        return self._scale * (h @ self._P.T @ self._A.T @ self._B.T)


def _projection(seed: int, width: int, base: Base) -> Tensor:
    """P, (width, the model's own), float32: the Q of a random matrix, one for all models of a width."""
    d = int(base.model.config.get_text_config().hidden_size)
    drawn = generator(seed, "projection", d).standard_normal((max(width, d), min(width, d)))
    Q, R = np.linalg.qr(drawn)
    Q = Q * np.sign(R.diagonal())  # the one Q of which R's diagonal is positive, whichever LAPACK is there
    return torch.from_numpy(Q.T if width <= d else Q).float().contiguous()


def _own(fresh: Adapter, memory: Mapping[str, Tensor]) -> Adapter:
    """The client's own pairs and head: fresh ones, with the tensors that it has kept."""
    return fresh.with_tensors({n: memory.get(f"local/{n}", tensor) for n, tensor in fresh.tensors()})
