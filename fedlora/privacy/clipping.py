"""Rows' gradients, each shortened to the clip: what bounds what a record can do to a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1e-5  # relative; larger than the rounding of `_norms`, so that no row exceeds the clip
BLOCK = 1024  # numbers whose squares are added in float32; with more, rounding would exceed the margin


@dataclass(frozen=True)
class Clipped:
    """What is left of the gradients of a micro-batch's rows.

    Args:
        total: the sum of the rows, each of which is at most as long as the clip; (numbers,).
        shortened: how many were longer, on the device.
        rows: how many there were.
    """

    total: Tensor
    shortened: Tensor
    rows: int


def shares(rows: Tensor, clip: Tensor | float) -> tuple[Tensor, Tensor]:
    """What each row is to be multiplied with, so that its norm is at most the clip, and whether that is less.

    A row that is not finite gets 0, and has only finite numbers afterwards, so that it counts as zero.

    Args:
        rows: (rows, numbers), whose numbers that are not finite are changed in place.
        clip: the largest norm, or one for each row, (rows,).

    Returns:
        float64 and bool, both (rows,).
    """
    norms = _norms(rows)
    finite = norms.isfinite()
    rows.nan_to_num_(0.0, 0.0, 0.0)
    factor = (clip / (norms * (1 + MARGIN)).clamp_min(1e-300)).clamp_max(1.0)
    return torch.where(finite, factor, torch.zeros_like(factor)), finite & (factor < 1)


def clipped(rows: Tensor, clip: float) -> Clipped:
    """The sum of the rows of one client, each of which is clipped.

    Args:
        rows: (rows, numbers); see `shares`.
        clip: the largest norm of a row.
    """
    factor, shortened = shares(rows, clip)
    return Clipped(factor.to(rows) @ rows, shortened.sum(), len(rows))


def _norms(rows: Tensor) -> Tensor:
    """The norm of each row, (rows,), float64: blocks in the rows' own type, then their sum in float64.

    In float32 alone, the norm of millions of like numbers comes out a thousandth too small.
    """
    count = rows.shape[1] // BLOCK
    whole = rows[:, : count * BLOCK].reshape(len(rows), count, BLOCK)
    blocks = torch.linalg.vector_norm(whole, dim=2)
    rest = torch.linalg.vector_norm(rows[:, count * BLOCK :], dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(torch.cat([blocks, rest], dim=1).double(), dim=1)
    return norms
