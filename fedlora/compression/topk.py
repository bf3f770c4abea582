"""Top-k: the largest numbers of a change, whichever tensors they are in, and their places.

Aji, Heafield. "Sparse Communication for Distributed Gradient Descent". EMNLP 2017.
https://arxiv.org/abs/1704.05021; for LoRA as FLASC has it: Kuo, Raje, Rajesh, Smith. "Federated LoRA with
Sparse Communication". 2024. https://arxiv.org/abs/2406.05233. Of the n numbers of the change, the head's
included, k = density · n travel; training stays dense.

Differs from FLASC: the density of downloads is 1, and the strategy takes the place of its server's Adam.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.ranges import check_number

from .base import Compression, Form, MessageKey, Numbers, check_word
from .places import length_of, read_places, write_places
from .words import code_of


@dataclass(frozen=True, kw_only=True)
class TopK(Compression):
    """The k numbers of largest magnitude; of equal ones the first.

    Args:
        density: k / n, the share of the numbers that travel; at least one does.
        values: what these are coded by: none, bf16, int8 or nf4.
    """

    density: float = 0.1
    values: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("compression.density", self.density, above=0, most=1)
        check_word("compression.values", self.values)

    @property
    def exact(self) -> bool:
        """Whether all numbers travel, as they are."""
        return self.density == 1 and self.values == "none"

    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """The numbers that are kept, and their places unless all are."""
        count, among = kept(self.density, sizes), sum(sizes)
        places: Form = {"places": ("uint8", (length_of(count, among),))} if count < among else {}
        return code_of(self.values).form([count], key) | places

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The largest numbers, and where they are."""
        count, among = kept(self.density, sizes), len(numbers)
        at = largest(numbers, count)
        arrays = code_of(self.values).encode(numbers[at], [count], key)
        return arrays | ({"places": write_places(at, among)} if count < among else {})

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """Zero wherever no number was kept.

        Raises:
            IncompatibleUpdates: the places are none.
        """
        count, among = kept(self.density, sizes), sum(sizes)
        at = read_places(arrays["places"], count, among) if count < among else np.arange(among)
        found = np.zeros(among, dtype=np.float32)
        found[at] = code_of(self.values).decode(arrays, [count], key)
        return found


def kept(density: float, sizes: Sequence[int]) -> int:
    """k, how many of the numbers are kept."""
    return max(1, round(density * sum(sizes)))


def largest(numbers: Numbers, count: int) -> Any:
    """The places of so many numbers of largest magnitude, growing; what is not finite counts as largest."""
    size = np.where(np.isfinite(numbers), np.abs(numbers), np.inf)
    least = np.partition(size, len(size) - count)[len(size) - count]
    above, equal = np.flatnonzero(size > least), np.flatnonzero(size == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
