"""How a model on the CPU attends: over rows that lie end to end without padding, and in float32.

Rows of a pack meet in no layer but here: everywhere else a token is by itself. They are laid side by side,
padded, for as long as their attention takes, which is a small part of a model's arithmetic.

A model in bfloat16 attends in float32, since torch's fused attention goes backward ten times slower in
bfloat16 than in float32.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

OURS = "fedlora"
_here = threading.local()


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows that lie end to end: tokens of rows of these lengths, (1, all tokens, ...).

    Args:
        lengths: of the rows, each at least 1.
    """

    lengths: Sequence[int]

    @cached_property
    def starts(self) -> Tensor:
        """Where each row begins, (rows,)."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return ends - torch.tensor(self.lengths)

    @cached_property
    def positions(self) -> Tensor:
        """Each token's place in its row, (all tokens,)."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @cached_property
    def real(self) -> Tensor:
        """Which of the padded tokens are there, (rows, longest)."""
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    @cached_property
    def _places(self) -> Tensor | None:
        """Each token's place among the padded ones, (all tokens,); None where rows are equally long."""
        return None if bool(self.real.all()) else self.real.flatten().nonzero().squeeze(1)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, heads, all tokens, width) to (rows, heads, longest, width), zeros where there is no token."""
        heads, _, width = x.shape[1:]
        tokens = x[0].transpose(0, 1)
        if self._places is not None:
            empty = tokens.new_zeros(self.real.numel(), heads, width)
            tokens = empty.index_copy(0, self._places, tokens)
        return tokens.reshape(*self.real.shape, heads, width).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """(rows, longest, ...) to (1, all tokens, ...)."""
        tokens = x.flatten(0, 1)
        return (tokens if self._places is None else tokens.index_select(0, self._places))[None]


@contextmanager
def end_to_end(pack: Pack) -> Iterator[None]:
    """Within it, models of this thread are fed rows that lie as this pack says."""
    _here.pack = pack
    try:
        yield
    finally:
        _here.pack = None


def packed() -> Pack | None:
    """The pack that this thread's models are fed, if they are."""
    return getattr(_here, "pack", None)


def attend_our_way(model: Any) -> bool:
    """Let a model of transformers attend as this module says; False where it cannot, or need not.

    Args:
        model: on its device.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(OURS, _attend)
    AttentionMaskInterface.register(OURS, _mask)
    model.set_attn_implementation(OURS)
    return bool(model.config._attn_implementation == OURS)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    pack, dtype = packed(), query.dtype
    parts = (query, key, value)
    if pack is not None:
        parts = tuple(pack.unpack(x) for x in parts)  # type: ignore[assignment]
        causal = named.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        # On the right there is only padding, which no real token sees if none sees what follows it.
        mask = None if causal or pack.real.all() else pack.real[:, None, None, :]
    if dtype == torch.bfloat16:
        parts = tuple(x.float() for x in parts)  # type: ignore[assignment]
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    found: Tensor = sdpa_attention_forward(module, *parts, mask, **named)[0]
    found = found.to(dtype)
    return (found if pack is None else pack.pack(found)), None


def _mask(*args: Any, **named: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = None if packed() is not None else sdpa_mask(*args, **named)
    return made
