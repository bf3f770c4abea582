"""Clipped updates: every client shortens its own change before it leaves."""

from dataclasses import dataclass

from fedlora.core.update_step import ClientUpdate, UpdateStep
from fedlora.core.vectors import flat
from fedlora.ranges import check_number


@dataclass(frozen=True)
class Clip(UpdateStep):
    """No client sends a longer change than `bound`: a longer one is shortened, all its tensors alike.

    Zhang, Chen, Hong, Wu, Yi. "Understanding Clipping for Federated Learning: Convergence and Client-Level
    Differential Privacy". ICML 2022. https://arxiv.org/abs/2106.13673. Their clip without their noise:

        Δ min(1, bound / ‖Δ‖)

    Δ is the change of all shared tensors together, of A, of B and of the head. The clip holds an honest
    client whose training has gone astray, above all under secure_sum, where nobody could find it out. It does
    not hold a client that lies: that takes a rule at the server, such as `NormBound`. A change that is not
    finite stays so, and is refused further on.

    Args:
        bound: the largest norm.
    """

    bound: float

    def __post_init__(self) -> None:
        check_number("Clip.bound", self.bound, above=0)

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        """The update with its change shortened."""
        change = given.change
        norm = float(flat(change).norm())
        if norm <= self.bound:
            return given
        return given.moved({name: moved * (self.bound / norm) for name, moved in change.items()})
