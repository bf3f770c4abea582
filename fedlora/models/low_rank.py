"""The low-rank term of a layer, each client's rows through its own factors, as one autograd function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Lengths = list[list[int]]


def add_low_rank(
    output: Tensor,
    x: Tensor,
    rows: int,
    segments: list[tuple[int, int]],
    scales: list[float],
    factors: list[Tensor],
    lengths: Lengths | None = None,
) -> Tensor:
    """Add scale · x Aᵀ Bᵀ to the output in place, each segment of rows through its own factors.

    Args:
        output: (rows, ..., d_out), a layer's output that nothing else holds; or rows as (1, rows, d_out).
        x: (rows, ..., d_in), the layer's input; or (1, rows, d_in).
        rows: how many there are.
        segments: first and last row of each slot.
        scales: one a slot.
        factors: A (r, d_in) and B (d_out, r) of each slot, one after the other. One with a dimension before
            these holds the same factor once for each of the slot's rows, and gets each row's own gradient.
        lengths: of each slot how many rows of `x` belong to each row of the batch, where they differ.
    """
    added: Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
        output, x, rows, segments, scales, lengths, *factors
    )
    return added


class _LowRank(torch.autograd.Function):
    """output += scale · x Aᵀ Bᵀ, each segment of rows through its own factors.

    In place on the layer's output, which nothing else holds. Several times faster than gathering factors for
    each row, and a smaller rank costs less instead of being padded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        rows: int,
        segments: list[tuple[int, int]],
        scales: list[float],
        lengths: Lengths | None,
        *factors: Tensor,
    ) -> Tensor:
        flat_x, flat_y = _flat(x, factors[0].dtype), output.view(-1, output.shape[-1])
        tokens = len(flat_x) // max(1, rows)  # of a row
        inner = []
        for k, (start, stop) in enumerate(segments):
            part = slice(start * tokens, stop * tokens)
            A, B = _one(factors[2 * k]), _one(factors[2 * k + 1])
            u = (flat_x[part] @ A.T).mul_(scales[k])
            flat_y[part] += (u @ B.T).to(output.dtype)
            inner.append(u)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, *inner, *factors)
        ctx.segments, ctx.scales, ctx.tokens, ctx.lengths = segments, scales, tokens, lengths
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        K, grad = len(ctx.segments), grads[0]
        x, *saved = ctx.saved_tensors  # once: they may be computed again for it
        inner, factors, wanted = saved[:K], saved[K:], ctx.needs_input_grad[6:]
        flat_x, flat_grad = _flat(x, factors[0].dtype), _flat(grad, factors[0].dtype)
        grad_x = torch.empty_like(flat_x) if ctx.needs_input_grad[1] else None
        grad_factors: list[Tensor | None] = [None] * len(factors)
        for k, (start, stop) in enumerate(ctx.segments):
            if start == stop:
                continue
            part = slice(start * ctx.tokens, stop * ctx.tokens)
            g, each = flat_grad[part], ctx.lengths and ctx.lengths[k]
            if wanted[2 * k + 1]:
                grad_factors[2 * k + 1] = _product(g, inner[k], factors[2 * k + 1], each)
            if not (wanted[2 * k] or grad_x is not None):
                continue
            v = (g @ _one(factors[2 * k + 1])).mul_(ctx.scales[k])
            if wanted[2 * k]:
                grad_factors[2 * k] = _product(v, flat_x[part], factors[2 * k], each)
            if grad_x is not None:
                torch.mm(v, _one(factors[2 * k]), out=grad_x[part])
        grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        return grad, grad_x, None, None, None, None, *grad_factors


def _one(factor: Tensor) -> Tensor:
    """The factor itself, of one that is held once for each row."""
    return factor if factor.ndim == 2 else factor[0]


def _product(left: Tensor, right: Tensor, factor: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """leftᵀ right, of (rows · tokens, ...): over all rows, or for each row where the factor is held so."""
    if factor.ndim == 2:
        return left.T @ right
    if lengths is not None:
        parts = zip(left.split(lengths), right.split(lengths), strict=True)
        return torch.stack([one.T @ two for one, two in parts])
    rows = len(factor)
    return left.view(rows, -1, left.shape[1]).mT @ right.view(rows, -1, right.shape[1])


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
