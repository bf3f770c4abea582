"""Micro-batches on their way through the model and back, as large as memory allows."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.models import Base, MultiAdapterModel
from fedlora.models.memory import TRIED
from fedlora.models.pack import upload
from fedlora.training.batches import Micro, micro_batches
from fedlora.training.evaluation import losses_of
from fedlora.training.gradients import Gathering
from fedlora.training.workers import Workers, in_turn


class Passes:
    """The passes of clients that train together.

    Args:
        base: the frozen model.
        bank: holds what they train.
        slots: how many they are.
        gathering: takes the gradients.
        workers: compute micro-batches side by side.
    """

    def __init__(
        self, base: Base, bank: MultiAdapterModel, slots: int, gathering: Gathering, workers: Workers
    ) -> None:
        self._base, self._bank, self._slots, self._gathering = base, bank, slots, gathering
        self._map = in_turn if gathering.in_turn else workers.map

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
            shares = dict.fromkeys(sorted({slot for slot, _ in micro}), 1.0)
            self._bank.gradients(self._losses(micro, shares)[0], list(shares))
            self._gathering.forget()
            return self._size(micro)

        try:
            self._base.memory.measure(trial)
        except torch.OutOfMemoryError:
            self._smaller([micro])

    def gradients(
        self, rows: Micro, shares: Mapping[int, float], tokens: int | None
    ) -> list[tuple[Micro, Tensor]]:
        """Gather the gradients of a step; its micro-batches, and their rows' losses times their shares.

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
            most = self._base.memory.rows(self._gathering.numbers)
            micros = micro_batches(rows, limit, self._base.traits, not self._bank.unpadded, most)
            try:
                found = self._map(lambda micro: self._there_and_back(micro, shares), micros)
                break
            except torch.OutOfMemoryError:
                pass  # the error holds on to what did not fit, and goes with this block
            self._gathering.forget()
            self._smaller(micros)
        for taken, _ in found:
            self._gathering.add(taken)
        return [(micro, losses) for micro, (_, losses) in zip(micros, found, strict=True)]

    def _there_and_back(self, micro: Micro, shares: Mapping[int, float]) -> tuple[Any, Tensor]:
        loss, weighted = self._losses(micro, shares)
        counts = Counter(slot for slot, _ in micro)
        return self._gathering.take(loss, {slot: counts[slot] for slot in sorted(counts)}), weighted

    def _losses(self, micro: Micro, shares: Mapping[int, float]) -> tuple[Tensor, Tensor]:
        """What is differentiated, and the rows' losses times their shares."""
        each, _ = losses_of(self._base, self._bank, micro, self._slots)
        share = torch.tensor([shares[slot] for slot, _ in micro], dtype=each.dtype)
        weighted = each * upload(share, each.device)
        return each.sum() if self._gathering.by_row else weighted.sum(), weighted.detach()

    def _smaller(self, micros: list[Micro]) -> None:
        sizes = [(self._size(micro), max(row.size for _, row in micro)) for micro in micros]
        self._base.memory.shrink(*max(sizes))
        self._bank.checkpoint()

    def _size(self, micro: Micro) -> int:
        lengths = [row.size for _, row in micro]
        return sum(lengths) if self._bank.unpadded else len(lengths) * max(lengths)
