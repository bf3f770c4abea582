"""The interface of a server optimizer: a step in the place of the plain change of a round."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.errors import ConfigError


@dataclass(frozen=True)
class ProductStep:
    """The step of one ΔW, and what is remembered of it.

    Args:
        more: by how much the step is more than the change Δ, (d_out, d_in); None where it is Δ itself.
        momentum: to be handed to the next call; None where there is nothing to remember.
        lost: ‖·‖² of what the momentum has not room for.
    """

    more: Pair | None
    momentum: Pair | None
    lost: float = 0.0


class ServerOptimizer(ABC):
    """What the server makes of a round's change Δ: the model moves by a step of the optimizer's instead of Δ.

    Subclasses are frozen dataclasses of their settings, and their methods are pure: what an optimizer
    remembers is handed to it and returned. `advance` applies it after the strategy has combined a round's
    updates, in the space that the strategy names (`Strategy.server_space`).

    Attributes:
        products: whether it also works on ΔW itself, by `product_step`. Only an optimizer whose steps are
            linear in the changes can: one that treats each number by itself depends on the basis.
    """

    products: ClassVar[bool] = False

    @abstractmethod
    def step(self, change: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The step of one tensor, in the place of its change, and what to remember until the next.

        Args:
            change: Δ, what the round has changed of the tensor, float64, of any shape.
            memory: what this method returned for the tensor the last time, float64; empty the first time.
        """

    def product_step(self, change: Pair, momentum: Pair | None) -> ProductStep:
        """The step of one ΔW.

        Args:
            change: Δ, what the round has changed of ΔW, (d_out, d_in).
            momentum: that of the last time; None the first time.

        Raises:
            ConfigError: the optimizer treats each number by itself.
        """
        raise ConfigError(
            f"server: {type(self).__name__} steps every number by itself and has no step of ΔW; use fedavgm, "
            "or a strategy whose server_space is factors"
        )


def adaptive_step(
    change: Tensor,
    memory: Mapping[str, Tensor],
    lr: float,
    beta1: float,
    tau: float,
    second: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The step that FedAdagrad, FedAdam and FedYogi have in common (Reddi et al., ICLR 2021, algorithm 2).

        m ← β₁ m + (1 − β₁) Δ,    v ← second(v, Δ²),    step = η m / (√v + τ)

    m starts at 0 and v at τ², and there is no bias correction.

    Args:
        change: Δ, float64.
        memory: "m" and "v" of the last time; empty the first time.
        lr: η.
        beta1: β₁.
        tau: τ.
        second: from v and Δ² to the next v.
    """
    m = memory.get("m", torch.zeros_like(change)) * beta1 + (1 - beta1) * change
    v = second(memory.get("v", torch.full_like(change, tau**2)), change.square())
    return lr * m / (v.sqrt() + tau), {"m": m, "v": v}
