"""Whole numbers of 8 bits, block by block, rounded at random so that they are right on average.

Alistarh, Grubic, Li, Tomioka, Vojnovic. "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding". NeurIPS 2017. https://arxiv.org/abs/1610.02132. With m the largest magnitude of a block:

    q = ⌊127 x / m + u⌋,    u uniform on [0, 1),    x̂ = q m / 127,    E x̂ = x

Differs from the paper: m takes the place of the norm of the vector, and the code has a fixed length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.ranges import check_whole

from .base import Compression, Form, MessageKey, Numbers, block_starts, by_blocks, scaled

LEVELS = 127


@dataclass(frozen=True, kw_only=True)
class Int8(Compression):
    """1 byte a number, and 4 a block for its largest magnitude.

    Args:
        block: how many numbers of a tensor share a scale.
    """

    codes_values = True
    block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("compression.block", self.block)

    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """A code for each number and a scale for each block."""
        blocks = len(block_starts(sizes, self.block))
        return {"codes": ("int8", (sum(sizes),)), "scales": ("float32", (blocks,))}

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The next whole number above or below, by chance."""
        shares, scales = by_blocks(numbers, sizes, self.block)
        drawn = np.floor(shares * LEVELS + key.own().random(len(shares)))
        codes = np.where(np.isfinite(drawn), drawn, 0).clip(-LEVELS, LEVELS)
        return {"codes": codes.astype(np.int8), "scales": scales}

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """Each code times its block's scale."""
        return scaled(arrays["codes"] / LEVELS, arrays["scales"], sizes, self.block)
