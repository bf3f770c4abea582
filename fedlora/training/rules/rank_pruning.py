"""The penalty on the last directions of every pair, and their pruning where training has made them lighter.

Cho, Liu, Xu, Fahrezi, Joshi. "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models".
EMNLP 2024. https://arxiv.org/abs/2401.06432

    loss     F(A, B) + λ Σ_m ‖B_m[:, ⌊γr⌋:]‖_F · ‖A_m[⌊γr⌋:, :]‖_F
    pruning  r ← ⌊γr⌋ if Σ_m ‖B_m[:, ⌊γr⌋:]‖_F · ‖A_m[⌊γr⌋:, :]‖_F is smaller than at the start of the round
"""

import math
from dataclasses import dataclass

from fedlora.core.adapter import Adapter
from fedlora.core.algebra import truncate
from fedlora.core.method import MethodPart


@dataclass(frozen=True)
class RankPruning(MethodPart):
    """A penalty on the tail of every pair, its directions from ⌊γr⌋ on, and the pruning of that tail.

    Args:
        gamma: γ, above 0 and below 1.
        penalty: λ.
        least: no rank is pruned below this.
    """

    gamma: float
    penalty: float
    least: int

    def start(self, rank: int) -> int:
        """⌊γr⌋, where the tail begins; below r, so that the tail is never empty."""
        return min(rank - 1, math.floor(self.gamma * rank + 1e-9))

    def pruned(self, rank: int) -> int:
        """The rank after one pruning."""
        return max(min(self.least, rank), self.start(rank))

    def replies(self, adapter: Adapter) -> tuple[Adapter, ...]:
        """The adapter after one pruning."""
        pairs = {name: truncate(pair, self.pruned(pair.rank)) for name, pair in adapter.pairs.items()}
        return (Adapter(pairs, adapter.extra),)
