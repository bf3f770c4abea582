"""Matrix products of which each part of the rows meets a matrix of its own, as one call or one by one.

The tokens of a batch lie client by client, so that the low-rank terms of all clients are one grouped product.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.models.pack import upload

TRIED = (5, 0, 11)  # rows of each part on which grouped products are tried


class Parts:
    """How rows are dealt to slots: those of one slot lie together, the slots in their order.

    Args:
        counts: rows of each slot; 0 where it has none.
        device: where the rows are.
    """

    def __init__(self, counts: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.counts, self._device = tuple(counts), device
        self.stops = tuple(itertools.accumulate(counts))
        self._ends: Tensor | None = None
        self._spread: dict[tuple[float, ...], Tensor | float] = {}

    def spans(self) -> list[tuple[int, int, int]]:
        """(slot, start, stop) of the slots that have rows."""
        starts = (0, *self.stops)
        return [(k, starts[k], stop) for k, stop in enumerate(self.stops) if stop > starts[k]]

    @property
    def ends(self) -> Tensor:
        """Where each slot's rows end, (slots,), in 32 bits."""
        if self._ends is None:
            self._ends = upload(torch.tensor(self.stops, dtype=torch.int32), self._device)
        return self._ends

    def spread(self, values: tuple[float, ...], dtype: torch.dtype) -> Tensor | float:
        """Each row's own of the slots' values, (rows, 1); one number where all slots have the same."""
        if len(set(values)) == 1:
            return values[0]
        if values not in self._spread:
            each = torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(self.counts))
            self._spread[values] = upload(each[:, None], self._device)
        return self._spread[values]


class Products(Protocol):
    """How such products are computed."""

    def rows(self, x: Tensor, matrices: Tensor, parts: Parts) -> Tensor:
        """Each part's rows times the part's own matrix: (n, a) and (slots, a, b) to (n, b)."""

    def outer(self, x: Tensor, y: Tensor, parts: Parts) -> Tensor:
        """Each part's xᵀ y, of (n, a) and (n, b): (slots, a, b), zeros for a part without rows."""


class OneByOne:
    """One product a part."""

    def rows(self, x: Tensor, matrices: Tensor, parts: Parts) -> Tensor:
        """As `Products.rows`."""
        found = x.new_empty(len(x), matrices.shape[-1])
        for k, start, stop in parts.spans():
            torch.mm(x[start:stop], matrices[k], out=found[start:stop])
        return found

    def outer(self, x: Tensor, y: Tensor, parts: Parts) -> Tensor:
        """As `Products.outer`."""
        found = x.new_zeros(len(parts.counts), x.shape[1], y.shape[1])
        for k, start, stop in parts.spans():
            torch.mm(x[start:stop].T, y[start:stop], out=found[k])
        return found


class Grouped:
    """All parts in one call, `torch.nn.functional.grouped_mm`; numbers of columns are multiples of 8."""

    def rows(self, x: Tensor, matrices: Tensor, parts: Parts) -> Tensor:
        """As `Products.rows`."""
        return F.grouped_mm(x, matrices, offs=parts.ends)

    def outer(self, x: Tensor, y: Tensor, parts: Parts) -> Tensor:
        """As `Products.outer`."""
        return F.grouped_mm(x.T, y, offs=parts.ends)


def outer_of_rows(x: Tensor, y: Tensor, rows: Parts) -> Tensor:
    """Each row's own xᵀ y, of (n, a) and (n, b): (rows, a, b); one product for rows of one length.

    Args:
        x: the tokens, row after row.
        y: the same.
        rows: how many tokens each row has.
    """
    if len(set(rows.counts)) == 1:
        count = len(rows.counts)
        return x.view(count, -1, x.shape[1]).mT @ y.view(count, -1, y.shape[1])
    even = all(z.shape[1] * z.element_size() % 16 == 0 for z in (x, y))
    grouped = even and x.device.type in ("cpu", "cuda") and grouped_works(str(x.device), x.dtype)
    return (Grouped() if grouped else OneByOne()).outer(x.contiguous(), y.contiguous(), rows)


def products_on(device: torch.device, dtype: torch.dtype) -> Products | None:
    """How a model's low-rank terms are computed; None on a CPU, where each slot has its own parameters.

    A CPU loses nothing by small products of exact ranks, and its threads take clients side by side.

    Args:
        device: where the model is.
        dtype: of the model.
    """
    if device.type != "cuda":
        return None
    return Grouped() if grouped_works(str(device), dtype) else OneByOne()


@functools.cache
def grouped_works(device: str, dtype: torch.dtype) -> bool:
    """Whether grouped products are what single ones are, an empty part among them; tried, not believed.

    Args:
        device: where.
        dtype: of the factors.
    """
    parts, plain, grouped = Parts(TRIED, device), OneByOne(), Grouped()
    x, y, W = (
        torch.linspace(-1, 1, a * b * c, device=device).sin().view(a, b, c).to(dtype)
        for a, b, c in ((1, sum(TRIED), 64), (1, sum(TRIED), 16), (len(TRIED), 16, 64))
    )
    try:
        pairs = [
            (grouped.rows(x[0], W.mT, parts), plain.rows(x[0], W.mT, parts)),
            (grouped.rows(y[0], W, parts), plain.rows(y[0], W, parts)),
            (grouped.outer(y[0], x[0], parts), plain.outer(y[0], x[0], parts)),
        ]
    except RuntimeError:
        return False
    wide = 0.02 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    return all(bool((one - two).abs().max() <= wide * two.abs().max()) for one, two in pairs)
