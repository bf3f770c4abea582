"""What an update counts that is some versions behind: the weights of FedAsync."""

from dataclasses import dataclass

from fedlora.errors import ConfigError
from fedlora.ranges import check_number, check_whole


@dataclass(frozen=True)
class Staleness:
    """s(τ), the weight of an update that is τ versions behind; s(0) = 1, and s never rises.

    Xie, Koyejo, Gupta. "Asynchronous Federated Optimization". OPT2020. https://arxiv.org/abs/1903.03934,
    section 5.2.

        constant      1
        polynomial    (τ + 1)^−a
        hinge         1 where τ ≤ b, else 1 / (a' (τ − b) + 1)

    Args:
        kind: constant, polynomial or hinge.
        exponent: a, at least 0; 0.5 is FedBuff's 1/√(1 + τ).
        slope: a' of the hinge, at least 0.
        threshold: b of the hinge, at least 0.
    """

    kind: str = "polynomial"
    exponent: float = 0.5
    slope: float = 10.0
    threshold: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "polynomial", "hinge"):
            raise ConfigError(
                f"scheduler.staleness: expected polynomial, hinge or constant, got '{self.kind}'"
            )
        check_number("scheduler.exponent", self.exponent, least=0)
        check_number("scheduler.slope", self.slope, least=0)
        check_whole("scheduler.threshold", self.threshold, 0)

    def factor(self, age: int) -> float:
        """s(τ)."""
        if self.kind == "polynomial":
            return float((age + 1.0) ** -self.exponent)
        if self.kind == "hinge" and age > self.threshold:
            return 1 / (self.slope * (age - self.threshold) + 1)
        return 1.0
