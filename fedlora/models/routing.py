"""Which rows of a batch are which slot's, as a layer's input shows them."""

import itertools
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ApartError, ModelError
from fedlora.models.products import Parts

Segments = list[tuple[int, int]]


@dataclass
class _Batch:
    rows: Segments
    tokens: Segments | None
    sizes: Sequence[int]
    parts: dict[tuple[int, int, int], Parts] = field(default_factory=dict)


class Routing:
    """How the batch of each thread is dealt to the slots; batches may be on their way in several threads.

    Args:
        slots: how many there are.
        by_row: the modules whose input has the rows of the batch as its first dimension; None if not known.
        device: where the model is.
        alone: whether each row has factors of its own, so that it must be known even of one slot.
    """

    def __init__(self, slots: int, by_row: Collection[str] | None, device: torch.device, alone: bool) -> None:
        self._slots, self._by_row, self._device, self._alone = slots, by_row, device, alone
        self._here = threading.local()

    @property
    def batch(self) -> Any:
        """This thread's batch, for another thread that computes the same; None before the first."""
        return getattr(self._here, "batch", None)

    @batch.setter
    def batch(self, batch: Any) -> None:
        self._here.batch = batch

    def set(self, counts: Sequence[int], sizes: Sequence[int] | None = None) -> None:
        """Say what each slot has in this thread's next batch.

        Args:
            counts: rows of each.
            sizes: tokens of each row, where they lie end to end.
        """
        rows = _segments(counts)
        tokens = None if sizes is None else _segments([sum(sizes[start:stop]) for start, stop in rows])
        self._here.batch = _Batch(rows, tokens, sizes or ())

    def segments(self, x: Tensor, name: str) -> Segments:
        """The rows (start, stop) of each slot; or the tokens, where rows lie end to end.

        Args:
            x: the input of a layer.
            name: the layer.

        Raises:
            ApartError: the clients of several slots cannot be told apart there.
            ModelError: single rows cannot.
        """
        batch: _Batch | None = self.batch
        tokens = batch.tokens if batch else None
        if tokens is not None and x.ndim == 3 and x.shape[:2] == (1, tokens[-1][1]):
            return tokens
        if self._slots == 1 and not self._alone:
            return [(0, x.shape[0])]
        assert batch is not None, "say how a batch is dealt before the model computes it"
        if x.shape[0] != batch.rows[-1][1] or (self._by_row is not None and name not in self._by_row):
            told = (
                f"'{name}' is fed {tuple(x.shape)}, not one row for each of the {batch.rows[-1][1]} rows of "
                "the batch, so that they cannot be told apart by "
            )
            if self._alone:
                raise ModelError(f"{told}record; leave it out of lora.targets, or use privacy=none")
            raise ApartError(f"{told}client; train this model with engine.fuse=1")
        return batch.rows

    def parts(self, segments: Segments, rows: int) -> Parts:
        """How the rows of a layer's input are dealt, each segment having its share; made once a batch."""
        batch: _Batch | None = self.batch
        key = (len(segments), segments[-1][1], rows)
        kept = batch.parts if batch else {}
        if key not in kept:
            times = rows // max(1, segments[-1][1])
            kept[key] = Parts([(b - a) * times for a, b in segments], self._device)
        return kept[key]

    def rows(self, segments: Segments, rows: int, slot: int | None = None) -> Parts:
        """How the rows of a layer's input are dealt to the rows of the batch, or to those of one slot.

        Args:
            segments: of the slots, as the layer's input shows them.
            rows: of the input, all tokens together.
            slot: whose rows alone; None for all.
        """
        batch: _Batch | None = self.batch
        assert batch is not None
        first, last = batch.rows[slot] if slot is not None else (0, batch.rows[-1][1])
        key = (-1 if slot is None else -2 - slot, segments[-1][1], rows)
        if key not in batch.parts:
            each = [rows // max(1, batch.rows[-1][1])] * (last - first)
            sizes = batch.sizes[first:last] if segments is batch.tokens else each
            batch.parts[key] = Parts(sizes, self._device)
        return batch.parts[key]


def _segments(counts: Sequence[int]) -> Segments:
    """Start and stop of parts of these lengths, one after the other."""
    stops = list(itertools.accumulate(counts))
    return list(zip([0, *stops], stops, strict=False))
