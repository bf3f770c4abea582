"""FedAdagrad: steps that become shorter in every number that has already moved far.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. "Adaptive Federated Optimization". ICLR 2021.
https://arxiv.org/abs/2003.00295, algorithm 2 with β₁ = 0, as in the paper's experiments:

    v ← v + Δ²,    x ← x + η Δ / (√v + τ)

Conventions: v starts at τ², where Flower's class starts it at 0, and is otherwise the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.ranges import check_number
from fedlora.server_optimizers.base import ServerOptimizer, adaptive_step


@dataclass(frozen=True)
class FedAdagrad(ServerOptimizer):
    """For rare features, and for many rounds without a schedule: its rates fall by themselves.

    Args:
        lr: η, above 0, near the size of a number's first step.
        tau: τ, above 0; changes that are small beside it are not enlarged.
    """

    lr: float = 0.01
    tau: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("lr", "tau"):
            check_number(f"server.{name}", getattr(self, name), above=0)

    def step(self, change: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """η Δ / (√v + τ), and the next v."""
        step, kept = adaptive_step(change, memory, self.lr, 0.0, self.tau, lambda v, square: v + square)
        return step, {"v": kept["v"]}
