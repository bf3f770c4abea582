"""The cross-entropy of many tokens without all their logits at once.

Logits of a large vocabulary are the largest tensor of a pass: 8,192 tokens times 128,256 words are 4 GB in
float32, and the loss holds several such. The output layer is frozen and nothing follows it, so that a token's
gradient by its last state is known as soon as its logits are. It is kept in their place, piece by piece.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECE = 2**26  # logits that are there at once, 256 MB in float32; so few are made in one piece, as ever


def cross_entropy(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy, in float32 at least, and whether the likeliest token is the wanted one.

    Args:
        logits: (tokens, vocabulary).
        wanted: ids, (tokens,).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def cross_entropy_in_pieces(
    states: Tensor, vocabulary: nn.Linear, wanted: Tensor, piece: int = PIECE
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the logits that a frozen output layer makes of last states.

    Args:
        states: (tokens, width).
        vocabulary: the output layer; it gets no gradient.
        wanted: ids, (tokens,).
        piece: logits that are there at once, at most, if those of one token fit.
    """
    found: tuple[Tensor, Tensor] = _InPieces.apply(  # type: ignore[no-untyped-call]
        states, vocabulary.weight, vocabulary.bias, wanted, max(1, piece // vocabulary.out_features)
    )
    return found


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, tokens: int
    ) -> tuple[Tensor, Tensor]:
        keep = ctx.needs_input_grad[0]
        losses, right = [], []
        gradient = torch.empty_like(states) if keep else None
        for start in range(0, len(states), tokens):
            part = slice(start, start + tokens)
            logits = F.linear(states[part], weight, bias)
            loss, hit = cross_entropy(logits, wanted[part])
            losses.append(loss)
            right.append(hit)
            if gradient is not None:
                change = torch.softmax(logits, -1, dtype=loss.dtype)
                del logits
                change[torch.arange(len(change), device=change.device), wanted[part]] -= 1
                torch.mm(change.to(weight.dtype), weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        hits = torch.cat(right)
        ctx.mark_non_differentiable(hits)
        return torch.cat(losses), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None].to(gradient)), None, None, None, None
