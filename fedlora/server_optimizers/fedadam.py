"""FedAdam: Adam at the server, with the change of a round in the place of a gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. "Adaptive Federated Optimization". ICLR 2021.
https://arxiv.org/abs/2003.00295, algorithm 2:

    m ← β₁ m + (1 − β₁) Δ,    v ← β₂ v + (1 − β₂) Δ²,    x ← x + η m / (√v + τ)

Conventions: v takes the square of the raw change Δ, and not of m; v starts at τ² and m at 0; there is no bias
correction. Flower's class has the same m, v and τ, starts v at 0, and multiplies η in round t by
√(1 − β₂^(t+1)) / (1 − β₁^(t+1)). Here Δ counts clients by their weights, as the strategy does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.ranges import check_number
from fedlora.server_optimizers.base import ServerOptimizer, adaptive_step


@dataclass(frozen=True)
class FedAdam(ServerOptimizer):
    """Steps of a like size in every number, however rarely the clients change it.

    Args:
        lr: η, above 0, near the size of a number's step in a round.
        beta1: β₁, from 0 and below 1.
        beta2: β₂, from 0 and below 1.
        tau: τ, above 0; changes that are small beside it are not enlarged.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("lr", "tau"):
            check_number(f"server.{name}", getattr(self, name), above=0)
        for name in ("beta1", "beta2"):
            check_number(f"server.{name}", getattr(self, name), least=0, below=1)

    def step(self, change: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """η m / (√v + τ), and the next m and v."""

        def second(v: Tensor, square: Tensor) -> Tensor:
            return self.beta2 * v + (1 - self.beta2) * square

        return adaptive_step(change, memory, self.lr, self.beta1, self.tau, second)
