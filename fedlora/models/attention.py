"""How a model on the CPU attends: over rows that lie end to end without padding, and in float32.

Rows of a pack meet in no layer but here: everywhere else a token is by itself. For as long as their attention
takes, those of like length are laid side by side, in blocks, and padded a little.

A model in bfloat16 attends in float32, since torch's fused attention goes backward ten times slower in
bfloat16 than in float32.
"""

import functools
import inspect
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

OURS = "fedlora"
WIDTH = 16  # torch's fused attention takes half as long for a row of 32 tokens as for one of 30
# A comparison with "sdpa", alone or as one of several names.
COMPARED = re.compile(r"""(==|!=|\bin)\s*[(\[{]?[^\n:]*["']sdpa["']|["']sdpa["']\s*(==|!=|in\b)""")
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
    def blocks(self) -> list[tuple[int, Tensor | None]]:
        """Rows of like length, padded, shortest first: a block's width, and which of its tokens are there.

        The second is (rows, 1, 1, width), or None where all are there.
        """
        found = []
        for width, held in sorted(self._by_width.items()):
            real = torch.arange(width) < torch.tensor([self.lengths[row] for row in held])[:, None]
            found.append((width, None if bool(real.all()) else real[:, None, None, :]))
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
        places = torch.tensor(begins).repeat_interleave(torch.tensor(self.lengths)) + self.positions
        return None if torch.equal(places, torch.arange(at)) else places


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


def takes_our_attention(model: Any) -> bool:
    """Whether a model of transformers may attend as this module says, by its device and its code.

    It must attend by torch's function on the CPU ("sdpa"), and its code must not ask for that name: a model
    that does (DeepSeek-V3.2, whose sparse mask is for "eager" and "sdpa") would become another one.

    Args:
        model: on its device.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    return not any(_asks_for_sdpa(name) for name in {type(module).__module__ for module in model.modules()})


def attend_our_way(model: Any) -> bool:
    """Let a model of transformers attend as this module says; False where it cannot, or need not.

    Args:
        model: on its device.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if not takes_our_attention(model):
        return False
    AttentionInterface.register(OURS, _attend)
    AttentionMaskInterface.register(OURS, _mask)
    model.set_attn_implementation(OURS)
    return bool(model.config._attn_implementation == OURS)


def attend_plainly(model: Any) -> None:
    """Undo `attend_our_way`."""
    model.set_attn_implementation("sdpa")


@functools.cache
def _asks_for_sdpa(module: str) -> bool:
    """Whether the code of a module compares something with "sdpa"; True where there is no code to read."""
    if module.startswith("torch."):
        return False
    try:
        return COMPARED.search(inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError):
        return True


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    pack, dtype = packed(), query.dtype
    parts = (query, key, value)
    if dtype == torch.bfloat16:
        parts = tuple(x.float() for x in parts)  # type: ignore[assignment]
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        bias = {name: x.float() for name, x in named.items() if isinstance(x, Tensor) and x.dtype == dtype}
        named |= bias
    if pack is None:
        found: Tensor = sdpa_attention_forward(module, *parts, mask, **named)[0]
        return found.to(dtype), None
    causal = named.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    # On the right there is only padding, which no real token sees if none sees what follows it.
    masks = [None if causal else real for _, real in pack.blocks]
    blocks = zip(*(pack.spread(x) for x in parts), masks, strict=True)
    attended = [sdpa_attention_forward(module, *block, **named)[0] for block in blocks]
    return pack.gather(attended).to(dtype), None


def _mask(*args: Any, **named: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = None if packed() is not None else sdpa_mask(*args, **named)
    return made
