"""Micro-batches on their way through the model and back, as large as memory allows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.models import Base, MultiAdapterModel
from fedlora.models.memory import TRIED
from fedlora.models.pack import upload
from fedlora.training.batches import Micro, micro_batches
from fedlora.training.evaluation import losses_of
from fedlora.training.steps import Gradients
from fedlora.training.workers import Workers


class Passes:
    """The passes of clients that train together.

    Args:
        base: the frozen model.
        bank: holds what they train.
        slots: how many they are.
        by_row: whether each row gets its own gradient, of its own loss.
        workers: compute micro-batches side by side.
    """

    def __init__(
        self, base: Base, bank: MultiAdapterModel, slots: int, by_row: bool, workers: Workers
    ) -> None:
        self._base, self._bank, self._slots, self._by_row = base, bank, slots, by_row
        self._workers = workers

    def measure(self, tokens: int | None, rows: Micro) -> None:
        """Try how much memory a micro-batch takes, where that is not known; nothing is left of it.

        Args:
            tokens: of a micro-batch, as the user says; they are not measured then.
            rows: (slot, row) of all slots.
        """
        if tokens is not None or not self._base.memory.unknown or not rows:
            return
        micro = micro_batches(rows, TRIED, self._base.traits, not self._bank.unpadded)[0]

        def trial() -> int:
            self._there_and_back(micro, dict.fromkeys({slot for slot, _ in micro}, 1.0))
            self._forget()
            return self._size(micro)

        try:
            self._base.memory.measure(trial)
        except torch.OutOfMemoryError:
            self._smaller([micro])

    def gradients(
        self, rows: Micro, shares: Mapping[int, float], tokens: int | None
    ) -> list[tuple[Micro, Gradients, Tensor]]:
        """The micro-batches of a step, the gradients of each, and its rows' losses times their shares.

        What does not fit the memory of a GPU is done again in smaller micro-batches.

        Args:
            rows: (slot, row) of all slots.
            shares: by slot, what a row's loss is multiplied with.
            tokens: a micro-batch holds at most; None chooses by the rows.

        Raises:
            ModelError: a single row does not fit.
        """
        while True:
            limit = self._base.memory.limit(tokens)
            micros = micro_batches(rows, limit, self._base.traits, not self._bank.unpadded)
            try:
                found = self._workers.map(lambda micro: self._there_and_back(micro, shares), micros)
                return [(micro, *one) for micro, one in zip(micros, found, strict=True)]
            except torch.OutOfMemoryError:
                pass  # the error holds on to what did not fit, and goes with this block
            self._forget()
            self._smaller(micros)

    def _there_and_back(self, micro: Micro, shares: Mapping[int, float]) -> tuple[Gradients, Tensor]:
        each, _ = losses_of(self._base, self._bank, micro, self._slots)
        share = torch.tensor([shares[slot] for slot, _ in micro], dtype=each.dtype)
        weighted = each * upload(share, each.device)
        loss = each.sum() if self._by_row else weighted.sum()
        return self._bank.gradients(loss, sorted({slot for slot, _ in micro})), weighted.detach()

    def _forget(self) -> None:
        if self._bank.stacks:
            self._bank.stacks.forget()

    def _smaller(self, micros: list[Micro]) -> None:
        sizes = [(self._size(micro), max(row.size for _, row in micro)) for micro in micros]
        self._base.memory.shrink(*max(sizes))
        self._bank.checkpoint()

    def _size(self, micro: Micro) -> int:
        lengths = [row.size for _, row in micro]
        return sum(lengths) if self._bank.unpadded else len(lengths) * max(lengths)
