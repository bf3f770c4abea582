"""Rows that lie end to end without padding, and how they attend.

Rows of a pack meet in no layer but in attention: everywhere else a token is by itself. A `Pack` lays rows of
like length side by side for as long as their attention takes, in blocks, and pads them a little. A
`VarlenPack` leaves them where they are: a kernel of the GPU attends within the bounds of each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16  # torch's fused attention takes half as long for a row of 32 tokens as for one of 30


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on the model's device; towards a GPU without waiting for what it still computes."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows that lie end to end: tokens of rows of these lengths, (1, all tokens, ...).

    Args:
        lengths: of the rows, each at least 1.
        device: where the model is, and so the tensors of this pack.
    """

    lengths: Sequence[int]
    device: torch.device | str = "cpu"

    @cached_property
    def starts(self) -> Tensor:
        """Where each row begins, (rows,)."""
        return upload(self._ends - torch.tensor(self.lengths), self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Each token's place in its row, (all tokens,)."""
        return upload(self._positions, self.device)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, causal: bool, named: Any
    ) -> Tensor:
        """What each token makes of those of its row, (1, all tokens, heads, size).

        Args:
            module: the model's attention, of which transformers reads how many heads share a key.
            query: (1, heads, all tokens, size).
            key: (1, key heads, all tokens, size).
            value: as key.
            causal: whether a token sees none that follow it.
            named: what else transformers hands to an attention, such as its scale.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # On the right there is only padding, which no real token sees if none sees what follows it.
        masks = [None if causal else real for _, real in self.blocks]
        blocks = zip(*(self.spread(x) for x in (query, key, value)), masks, strict=True)
        return self.gather([sdpa_attention_forward(module, *block, **named)[0] for block in blocks])

    @cached_property
    def blocks(self) -> list[tuple[int, Tensor | None]]:
        """Rows of like length, padded, shortest first: a block's width, and which of its tokens are there.

        The second is (rows, 1, 1, width), or None where all are there.
        """
        found = []
        for width, held in sorted(self._by_width.items()):
            real = torch.arange(width) < torch.tensor([self.lengths[row] for row in held])[:, None]
            there = None if bool(real.all()) else upload(real[:, None, None, :], self.device)
            found.append((width, there))
        return found

    def spread(self, x: Tensor) -> list[Tensor]:
        """(1, heads, all tokens, size) to each block's (rows, heads, width, size), zeros for padding."""
        tokens = x[0].transpose(0, 1)
        if self._places is not None:
            tokens = _Spread.apply(tokens, self._places, sum(self._sizes))  # type: ignore[no-untyped-call]
        parts = zip(torch.split(tokens, self._sizes), self.blocks, strict=True)
        return [part.view(-1, width, *part.shape[1:]).transpose(1, 2) for part, (width, _) in parts]

    def gather(self, blocks: Sequence[Tensor]) -> Tensor:
        """Each block's (rows, width, ...) to (1, all tokens, ...)."""
        tokens = torch.cat([block.flatten(0, 1) for block in blocks])
        if self._places is not None:
            tokens = _Gather.apply(tokens, self._places)  # type: ignore[no-untyped-call]
        return tokens[None]

    @cached_property
    def _by_width(self) -> dict[int, list[int]]:
        """Width -> rows that are padded to it."""
        found: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            found.setdefault(-(-length // WIDTH) * WIDTH, []).append(row)
        return found

    @cached_property
    def _sizes(self) -> list[int]:
        """How many tokens each block has, padding included."""
        return [width * len(held) for width, held in sorted(self._by_width.items())]

    @cached_property
    def _places(self) -> Tensor | None:
        """Each token's place among those of all blocks, (all tokens,); None where it is where it was."""
        begins, at = [0] * len(self.lengths), 0
        for width, held in sorted(self._by_width.items()):
            for row in held:
                begins[row], at = at, at + width
        places = torch.tensor(begins).repeat_interleave(torch.tensor(self.lengths)) + self._positions
        return None if torch.equal(places, torch.arange(at)) else upload(places, self.device)

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor(self.lengths).cumsum(0)

    @cached_property
    def _positions(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])


class VarlenPack(Pack):
    """Rows that attend where they lie, by torch's attention over rows of any lengths: a GPU, bfloat16."""

    @cached_property
    def bounds(self) -> Tensor:
        """Where each row begins, and where the last one ends, (rows + 1,), in 32 bits."""
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), self._ends])
        return upload(bounds.to(torch.int32), self.device)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, causal: bool, named: Any
    ) -> Tensor:
        """As `Pack.attend`."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        longest, shared = max(self.lengths), q.shape[1] != k.shape[1]
        window = (-1, 0) if causal else (-1, -1)
        found = varlen_attn(
            q, k, v, self.bounds, self.bounds, longest, longest,
            scale=named.get("scaling"), window_size=window, enable_gqa=shared,
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found[None]


class _Spread(torch.autograd.Function):
    """Tokens at their places among zeros. Autograd's own way makes copies of all the zeros, both ways."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.new_zeros(count, *tokens.shape[1:]).index_copy_(0, places, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(grads[0], *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """The tokens at some places, none of them twice."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(tokens)
        return tokens.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.count), None  # type: ignore[no-untyped-call]
