"""FedProx: a client is held near the model that it was sent.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. "Federated Optimization in Heterogeneous Networks". MLSys 2020.
https://arxiv.org/abs/1812.06127, equation 2:

    min_w F_k(w) + μ/2 ‖w − w^t‖²

w is all that a client trains: factors, head, and its own parts where it has some, and w^t is where it begins
the round. The proximal term pulls on the factors and not on their product.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlora.ranges import check_number
from fedlora.training.rules.base import LocalRule


@dataclass(frozen=True)
class FedProx(LocalRule):
    """For clients whose rows differ, or who train many steps.

    Args:
        mu: μ, at least 0. A plain gradient step is stable only while its rate times μ is below 2.
    """

    mu: float = 0.01

    independent_of_rows = True

    def __post_init__(self) -> None:
        check_number("FedProx.mu", self.mu, least=0)

    def gradient(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """μ (w − w^t)."""
        return {name: self.mu * (tensor - start[name]) for name, tensor in tensors.items()}
