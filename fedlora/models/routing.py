"""Which rows of a batch are which slot's, as a layer's input shows them."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ApartError, ModelError
from fedlora.models.products import Parts
from fedlora.models.traits import Traits

Segments = list[tuple[int, int]]


@dataclass
class _Batch:
    rows: Segments
    tokens: Segments | None
    sizes: Sequence[int]
    layouts: dict[tuple[int, int], "Layout"] = field(default_factory=dict)


class Layout:
    """How the rows of a layer's input, its tokens one after the other, are dealt.

    Args:
        sizes: of each slot, how many rows of the input each of its rows of the batch has; where these need no
            gradients of their own, it may be their sum.
        device: where the input is.
        segments: start and stop of each slot in rows of the batch, which then have equally many rows of the
            input each; None takes start and stop in rows of the input.

    Attributes:
        slots: the rows of each slot.
        segments: start and stop of each slot.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], device: torch.device, segments: Segments | None = None
    ) -> None:
        self.sizes, self._device, self._of = sizes, device, dict[int, Parts]()
        self.slots = Parts([sum(own) for own in sizes], device)
        self.segments = _segments(self.slots.counts) if segments is None else segments

    @cached_property
    def rows(self) -> Parts:
        """The rows of each row of the batch."""
        return Parts([size for own in self.sizes for size in own], self._device)

    def rows_of(self, slot: int) -> Parts:
        """The rows of each row of one slot."""
        if slot not in self._of:
            self._of[slot] = Parts(self.sizes[slot], self._device)
        return self._of[slot]


class Routing:
    """How the batch of each thread is dealt to the slots; batches may be on their way in several threads.

    Args:
        slots: how many there are.
        traits: of the model: which modules' input has rows, or tokens row after row, as its first dimension.
        device: where the model is.
        alone: whether each row has factors of its own, so that it must be known even of one slot.
    """

    def __init__(self, slots: int, traits: Traits, device: torch.device, alone: bool) -> None:
        self._slots, self._traits, self._device, self._alone = slots, traits, device, alone
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

    def segments(self, x: Tensor, name: str, flat: bool = False) -> Segments:
        """The rows (start, stop) of each slot; or the tokens, where rows lie end to end.

        Args:
            x: the input of a layer.
            name: the layer.
            flat: whether the input may also be (tokens, d), the rows one after the other and equally long.

        Raises:
            ApartError: the clients of several slots cannot be told apart there.
            ModelError: single rows cannot.
        """
        batch: _Batch | None = self.batch
        tokens = batch.tokens if batch else None
        if tokens is not None and x.ndim == 3 and x.shape[:2] == (1, tokens[-1][1]):
            return tokens
        flat = flat and x.ndim == 2 and name in self._traits.by_token
        if tokens is not None and flat and len(x) == tokens[-1][1]:
            return tokens
        if self._slots == 1 and not self._alone:
            return [(0, x.shape[0])]
        assert batch is not None, "say how a batch is dealt before the model computes it"
        by_row, rows = self._traits.by_row, batch.rows[-1][1]
        if flat and tokens is None and len(x) % rows == 0:
            return batch.rows
        if len(x) != rows or (by_row is not None and name not in by_row):
            told = (
                f"'{name}' is fed {tuple(x.shape)}, not one row for each of the {rows} rows of "
                "the batch, so that they cannot be told apart by "
            )
            if self._alone:
                raise ModelError(f"{told}record; leave it out of lora.targets, or use privacy=none")
            raise ApartError(f"{told}client; train this model with engine.fuse=1")
        return batch.rows

    def layout(self, x: Tensor, name: str) -> Layout:
        """How the rows of a layer's input are dealt; made once a batch for all layers that are fed alike.

        Args:
            x: the input, which may also be (tokens, d).
            name: the layer.

        Raises:
            ApartError: the clients of several slots cannot be told apart there.
            ModelError: single rows cannot.
        """
        batch: _Batch | None = self.batch
        segments = self.segments(x, name, flat=True)
        units, rows = segments[-1][1], x.numel() // x.shape[-1]
        kept, key = batch.layouts if batch else {}, (units, rows)
        if key not in kept:
            times = rows // max(1, units)
            sizes: list[Sequence[int]] = [[(stop - start) * times] for start, stop in segments]
            if self._alone:
                assert batch is not None
                each = batch.sizes if segments is batch.tokens else [times] * units
                sizes = [each[start:stop] for start, stop in batch.rows]
            kept[key] = Layout(sizes, self._device, segments)
        return kept[key]


def _segments(counts: Sequence[int]) -> Segments:
    """Start and stop of parts of these lengths, one after the other."""
    stops = list(itertools.accumulate(counts))
    return list(zip([0, *stops], stops, strict=False))
