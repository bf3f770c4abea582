"""Which rows of a batch are which slot's, as a layer's input shows them."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    parts: dict[tuple[int, int, int], Parts] = field(default_factory=dict)


class Routing:
    """How the batch of each thread is dealt to the slots; batches may be on their way in several threads.

    Args:
        slots: how many there are.
        traits: of the model: which modules' input has rows, or tokens row after row, as its first dimension.
        device: where the model is.
        alone: whether each row has factors of its own, so that it must be known even of one slot.
    """

    def __init__(self, slots: int, traits: Traits, device: torch.device, alone: bool) -> None:
        self._slots, self._traits, self._device, self.alone = slots, traits, device, alone
        self._here = threading.local()

    @property
    def batch(self) -> Any:
        """This thread's batch, for another thread that computes the same; None before the first."""
        return getattr(self._here, "batch", None)

    @batch.setter
    def batch(self, batch: Any) -> None:
        self._here.batch = batch

    def set(self, counts: Sequence[int], tokens: Sequence[int] | None = None) -> None:
        """Say what each slot has in this thread's next batch: rows, and tokens where rows lie end to end."""
        self._here.batch = _Batch(_segments(counts), None if tokens is None else _segments(tokens))

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
        if self._slots == 1 and not self.alone:
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
            if self.alone:
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


def _segments(counts: Sequence[int]) -> Segments:
    """Start and stop of parts of these lengths, one after the other."""
    stops = list(itertools.accumulate(counts))
    return list(zip([0, *stops], stops, strict=False))
