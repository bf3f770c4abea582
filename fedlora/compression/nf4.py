"""NormalFloat: 16 levels at the quantiles of a normal distribution, block by block, rounded at random.

Dettmers, Pagnoni, Holtzman, Zettlemoyer. "QLoRA: Efficient Finetuning of Quantized LLMs". NeurIPS 2023.
https://arxiv.org/abs/2305.14314

Differs from the paper: a number between two levels becomes the upper one as often as it is near to it, so
that it is right on average; the paper takes the nearest. The scales of blocks are not quantised again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.ranges import check_whole

from .base import Compression, Form, MessageKey, Numbers, block_starts, by_blocks, scaled

LEVELS = np.array(  # appendix E of the paper
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


@dataclass(frozen=True, kw_only=True)
class NF4(Compression):
    """Half a byte a number, and 4 bytes a block for its largest magnitude.

    Args:
        block: how many numbers of a tensor share a scale.
    """

    codes_values = True
    block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("compression.block", self.block)

    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """Two codes a byte, and a scale for each block."""
        blocks = len(block_starts(sizes, self.block))
        return {"codes": ("uint8", ((sum(sizes) + 1) // 2,)), "scales": ("float32", (blocks,))}

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The next level above or below, by chance."""
        shares, scales = by_blocks(numbers, sizes, self.block)
        shares = np.where(np.isfinite(shares), shares, 0)
        below = np.searchsorted(LEVELS, shares, side="right").clip(1, len(LEVELS) - 1) - 1
        part = (shares - LEVELS[below]) / (LEVELS[below + 1] - LEVELS[below])
        codes = below + (key.own().random(len(shares)) < part)
        whole = np.append(codes, [0] * (len(codes) % 2)).astype(np.uint8)
        return {"codes": whole[::2] | whole[1::2] << 4, "scales": scales}

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """The level of each code times its block's scale."""
        packed, length = arrays["codes"], sum(sizes)
        codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:length]
        return scaled(LEVELS[codes], arrays["scales"], sizes, self.block)
