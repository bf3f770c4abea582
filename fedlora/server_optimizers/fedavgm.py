"""FedAvgM: the server moves with momentum.

Hsu, Qi, Brown. "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification". 2019. https://arxiv.org/abs/1909.06335

    m ← β m + Δ,    x ← x + η m

Conventions: m starts at 0, so that the first m is Δ, as in Flower's class; Δ enters with weight 1 and not
1 − β, so that at β = 0.9 a direction in which all rounds agree moves up to ten times as far. There is no
dampening and no Nesterov step. With η = 1 and β = 0 the server moves by Δ, bit for bit.

Momentum commutes with every fixed linear map, so that it means the same in B beside a frozen A as in ΔW, and
it can be kept of ΔW itself, where the factors have no basis that lasts:

    M ← [β M + Δ]_ρ,    ΔW ← ΔW + η (β M + Δ)

M is a pair of rank ρ at most. The step that is taken is the whole one; what ρ directions do not hold of the
new M is forgotten in later rounds, and `momentum_kept` in a round's line is the share of ‖M‖² that they hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.algebra import beyond, norm, truncate, weighted_sum
from fedlora.ranges import check_number, check_whole
from fedlora.server_optimizers.base import ProductStep, ServerOptimizer


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """For clients whose rows differ, or where a round samples few of many.

    Args:
        lr: η, above 0.
        momentum: β, from 0 and below 1.
        rank: ρ, the directions of the momentum of a ΔW, where it is kept of ΔW; at least 1.
    """

    lr: float = 1.0
    momentum: float = 0.9
    rank: int = 32

    products = True

    def __post_init__(self) -> None:
        check_number("server.lr", self.lr, above=0)
        check_number("server.momentum", self.momentum, least=0, below=1)
        check_whole("server.rank", self.rank)

    def step(self, change: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """η (β m + Δ); nothing is remembered where β is 0."""
        m = change + self.momentum * memory["m"] if "m" in memory else change
        return self.lr * m, {"m": m} if self.momentum else {}

    def product_step(self, change: Pair, momentum: Pair | None) -> ProductStep:
        """More than Δ by η β M + (η − 1) Δ; the next M is [β M + Δ]_ρ."""
        past = [] if momentum is None else [(momentum, self.momentum)]
        more = _sum([(change, self.lr - 1), *((pair, self.lr * beta) for pair, beta in past)])
        if not self.momentum:
            return ProductStep(more, None)
        grown = _sum([(change, 1.0), *past])
        assert grown is not None
        return ProductStep(more, truncate(grown, self.rank), norm(beyond(grown, self.rank)) ** 2)


def _sum(terms: Sequence[tuple[Pair, float]]) -> Pair | None:
    """Σ w ΔW in the fewest directions, the strongest first; None without a weight that is not zero."""
    counted = [(pair, weight) for pair, weight in terms if weight]
    if not counted:
        return None
    pairs, weights = zip(*counted, strict=True)
    return weighted_sum(pairs, weights, 1.0)
