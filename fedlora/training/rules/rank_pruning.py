"""HetLoRA's rule: a penalty on the last directions of every pair, and their pruning where they got lighter.

Cho, Liu, Xu, Fahrezi, Joshi. "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models".
EMNLP 2024. https://arxiv.org/abs/2401.06432

    loss     F(A, B) + λ Σ_m ‖B_m[:, ⌊γr⌋:]‖_F · ‖A_m[⌊γr⌋:, :]‖_F
    pruning  r ← ⌊γr⌋ if Σ_m ‖B_m[:, ⌊γr⌋:]‖_F · ‖A_m[⌊γr⌋:, :]‖_F is smaller than at the start of the round
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.algebra import truncate
from fedlora.training.rules.base import LocalRule


@dataclass(frozen=True)
class RankPruning(LocalRule):
    """A penalty on the tail of every pair, its directions from ⌊γr⌋ on, and the pruning of that tail.

    Args:
        gamma: γ, above 0 and below 1.
        penalty: λ, at least 0.
        least: no rank is pruned below this.
    """

    gamma: float
    penalty: float
    least: int

    independent_of_rows = True

    def start(self, rank: int) -> int:
        """⌊γr⌋, where the tail begins; below r, so that the tail is never empty."""
        return min(rank - 1, math.floor(self.gamma * rank + 1e-9))

    def pruned(self, rank: int) -> int:
        """The rank after one pruning."""
        return max(min(self.least, rank), self.start(rank))

    def gradient(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of the penalty, zero off the tails."""
        modules = [n.removesuffix(".A") for n in tensors if n.endswith(".A") and f"{n[:-2]}.B" in tensors]
        if not (self.penalty and modules):
            return {}
        with torch.enable_grad():
            own = {n: tensors[n].detach().requires_grad_() for m in modules for n in (f"{m}.A", f"{m}.B")}
            lengths = [self._length(own[f"{m}.A"], own[f"{m}.B"]) for m in modules]
            grads = torch.autograd.grad(self.penalty * torch.stack(lengths).sum(), list(own.values()))
        return dict(zip(own, grads, strict=True))

    def finish(self, trained: Adapter, start: Adapter) -> Adapter:
        """Without the tails where training has made them lighter in all; as it is where it has not."""

        def weight(adapter: Adapter) -> float:
            return sum(float(self._length(p.A.double(), p.B.double())) for p in adapter.pairs.values())

        return self.replies(trained)[0] if weight(trained) < weight(start) else trained

    def replies(self, adapter: Adapter) -> tuple[Adapter, ...]:
        """The adapter after one pruning."""
        pairs = {name: truncate(pair, self.pruned(pair.rank)) for name, pair in adapter.pairs.items()}
        return (replace(adapter, pairs=pairs),)

    def _length(self, A: Tensor, B: Tensor) -> Tensor:
        """‖B[:, ⌊γr⌋:]‖_F · ‖A[⌊γr⌋:, :]‖_F."""
        cut = self.start(len(A))
        length: Tensor = B[:, cut:].norm() * A[cut:].norm()
        return length
