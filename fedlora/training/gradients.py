"""What becomes of a micro-batch's gradients until the step: they are added up, clipped row by row before.

Which of the ways is taken is decided in `gathering_of`, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fedlora.models import MultiAdapterModel
from fedlora.privacy import Mechanism
from fedlora.training.workers import Workers

if TYPE_CHECKING:
    from fedlora.privacy.optimizer import PrivateOptimizer
    from fedlora.privacy.stacked import PrivateStacks

Gradients = list[tuple[nn.Parameter, Tensor | None]]


class Gathering(Protocol):
    """How gradients come from losses to the parameters.

    Attributes:
        by_row: whether each row has a gradient of its own, of its own loss.
        numbers: of a row's own gradient; 0 where it has none.
        in_turn: whether micro-batches have to come one after the other.
    """

    by_row: bool
    numbers: int
    in_turn: bool

    def begin(self, slot: int, optimizer: torch.optim.Optimizer) -> None:
        """Make ready for the steps of a slot, by an optimizer of its own."""

    def take(self, loss: Tensor, counts: Mapping[int, int]) -> Any:
        """Differentiate the loss of a micro-batch; what is left of the gradients. In any thread.

        Args:
            loss: the sum of all rows' losses, or of their shares.
            counts: slot -> how many rows of it there are, in the order of slots.
        """

    def add(self, taken: Any) -> None:
        """Add what `take` has left, in the order of micro-batches."""

    def forget(self) -> None:
        """Forget what was added since the last release."""

    def release(self, rows: Mapping[int, int], workers: Workers) -> None:
        """Write the gradients of a step into the parameters.

        Args:
            rows: slot -> how many rows its step has, 0 with an empty batch.
            workers: do so for several slots side by side.
        """

    def end(self, slot: int) -> None:
        """Let go of the optimizer of a slot that has taken its last step."""

    def clipped(self, slot: int) -> float | None:
        """The share of a slot's rows whose gradient was longer than its mechanism's clip."""


class Added:
    """Gradients of sums of losses: they are added up where the parameters have them."""

    by_row, numbers = False, 0

    def __init__(self, bank: MultiAdapterModel) -> None:
        self._bank = bank
        self.in_turn = bank.stacks is not None  # whose gradients are one tensor of all micro-batches

    def begin(self, slot: int, optimizer: torch.optim.Optimizer) -> None:
        """As `Gathering.begin`."""

    def take(self, loss: Tensor, counts: Mapping[int, int]) -> Gradients:
        """As `Gathering.take`."""
        return self._bank.gradients(loss, list(counts))

    def add(self, taken: Gradients) -> None:
        """As `Gathering.add`."""
        accumulate(taken)

    def forget(self) -> None:
        """As `Gathering.forget`."""
        if self._bank.stacks:
            self._bank.stacks.forget()

    def release(self, rows: Mapping[int, int], workers: Workers) -> None:
        """As `Gathering.release`."""

    def end(self, slot: int) -> None:
        """As `Gathering.end`."""

    def clipped(self, slot: int) -> None:
        """As `Gathering.clipped`."""


class ClippedApart:
    """Rows' gradients, those of each slot clipped, added up and noised by an optimizer of its own."""

    by_row, in_turn = True, False

    def __init__(self, bank: MultiAdapterModel, mechanisms: Sequence[Mechanism]) -> None:
        self._bank, self._mechanisms = bank, mechanisms
        groups = [bank.factors(slot).values() for slot in range(len(mechanisms))]
        self.numbers = max(sum(p.numel() for found in own for p in found) for own in groups)
        self._own: dict[int, PrivateOptimizer] = {}
        self._clipped = [0.0] * len(mechanisms)

    def begin(self, slot: int, optimizer: torch.optim.Optimizer) -> None:
        """As `Gathering.begin`."""
        self._own[slot] = self._mechanisms[slot].wrap(optimizer)

    def take(self, loss: Tensor, counts: Mapping[int, int]) -> Any:
        """As `Gathering.take`."""
        found = dict(self._bank.gradients(loss, list(counts)))
        return {slot: self._own[slot].clip(found, count) for slot, count in counts.items()}

    def add(self, taken: Any) -> None:
        """As `Gathering.add`."""
        for slot, found in taken.items():
            self._own[slot].add(found)

    def forget(self) -> None:
        """As `Gathering.forget`: nothing was added before all micro-batches of the step were there."""

    def release(self, rows: Mapping[int, int], workers: Workers) -> None:
        """As `Gathering.release`."""
        workers.map(lambda slot: self._own[slot].release(rows[slot]), list(rows))

    def end(self, slot: int) -> None:
        """As `Gathering.end`."""
        own = self._own.pop(slot)
        self._clipped[slot] = own.clipped / max(1, own.seen)

    def clipped(self, slot: int) -> float:
        """As `Gathering.clipped`."""
        return self._clipped[slot]


class ClippedTogether:
    """Rows' gradients of all slots as one matrix, each row clipped by its slot's mechanism.

    Micro-batches are added up one by one, so that the rows of one alone are in memory.
    """

    by_row = in_turn = True

    def __init__(self, bank: MultiAdapterModel, private: "PrivateStacks", slots: int) -> None:
        self._bank, self._private, self._slots = bank, private, slots
        self.numbers = private.numbers

    def begin(self, slot: int, optimizer: torch.optim.Optimizer) -> None:
        """As `Gathering.begin`."""

    def take(self, loss: Tensor, counts: Mapping[int, int]) -> None:
        """As `Gathering.take`; the rows are added up at once."""
        rows = self._bank.row_gradients(loss, list(counts))
        self._private.add(rows, [counts.get(slot, 0) for slot in range(self._slots)])

    def add(self, taken: None) -> None:
        """As `Gathering.add`: it is done."""

    def forget(self) -> None:
        """As `Gathering.forget`."""
        self._private.forget()

    def release(self, rows: Mapping[int, int], workers: Workers) -> None:
        """As `Gathering.release`."""
        self._private.release(list(rows))

    def end(self, slot: int) -> None:
        """As `Gathering.end`."""

    def clipped(self, slot: int) -> float:
        """As `Gathering.clipped`."""
        return self._private.clipped(slot)


def gathering_of(bank: MultiAdapterModel, mechanisms: Sequence[Mechanism]) -> Gathering:
    """How the gradients of clients are gathered: private ones together, where their factors lie in stacks.

    Args:
        bank: holds what the clients train.
        mechanisms: one a slot, or none at all.
    """
    if not mechanisms:
        return Added(bank)
    if bank.stacks is None:
        return ClippedApart(bank, mechanisms)
    from fedlora.privacy.stacked import PrivateStacks

    heads = [bank.factors(slot).get("head", []) for slot in range(len(mechanisms))]
    return ClippedTogether(bank, PrivateStacks(mechanisms, bank.stacks, heads), len(mechanisms))


def accumulate(grads: Gradients) -> None:
    """Add gradients, in the order of micro-batches whichever was done first."""
    for parameter, grad in grads:
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
