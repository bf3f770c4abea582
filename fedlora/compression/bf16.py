"""bfloat16: the upper half of a float32, rounded at random so that it is right on average.

Kalamkar et al. "A Study of BFLOAT16 for Deep Learning Training". 2019. https://arxiv.org/abs/1905.12322
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Compression, Form, MessageKey, Numbers


@dataclass(frozen=True, kw_only=True)
class BF16(Compression):
    """2 bytes a number: sign, exponent and 7 bits, within 1 part in 128.

    numpy and Flower's arrays have no bfloat16, so the bits travel as uint16. A random number of 16 bits is
    added before the lower half is cut off, so that a number between two neighbours becomes the upper one as
    often as it is near to it.
    """

    codes_values = True

    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """One array of halves."""
        return {"halves": ("uint16", (sum(sizes),))}

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The upper 16 bits; infinity and NaN stay what they are."""
        bits = numbers.view(np.uint32)
        drawn = key.own().integers(0, 1 << 16, len(bits), dtype=np.uint32)
        rounded = np.where(np.isfinite(numbers), bits + drawn, bits | ((bits & 0xFFFF) != 0) << 16)
        return {"halves": (rounded >> 16).astype(np.uint16)}

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """The halves, each followed by 16 zeros."""
        numbers: Numbers = (arrays["halves"].astype(np.uint32) << 16).view(np.float32)
        return numbers
