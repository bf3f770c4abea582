"""Segments in turn: each client sends one part of its change, and clients send different parts.

"EcoLoRA: Communication-Efficient Federated Fine-Tuning of Large Language Models". EMNLP 2025.
https://arxiv.org/abs/2506.02001. The n numbers of a change are cut into N segments of one length. In round t
client k sends the segment (k + t) mod N. The server's mean of each segment is over those that sent it:

    x̂ = N x on the segment, else 0,

so that the mean over clients is that mean, if equally many send each segment and they count alike. A client
that takes part in every g-th round alone, with a divisor in common with N, never sends some segments; where
clients are drawn at random there is no such rhythm.

Differs from the paper: segments alone, without its sparse code and its schedule of densities for A and B
(`TopK` has a sparse code). A client goes on from what it is sent, and not from its own unsent segments. With
error feedback these are sent when it is their turn, and the factor N is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.ranges import check_whole

from .base import Compression, Form, MessageKey, Numbers, check_word
from .words import code_of


@dataclass(frozen=True, kw_only=True)
class Segments(Compression):
    """One of so many segments a round.

    Args:
        count: N, how many segments there are; there is never one without a number.
        values: what its numbers are coded by: none, bf16, int8 or nf4.
    """

    count: int = 4
    values: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("compression.count", self.count)
        check_word("compression.values", self.values)

    @property
    def exact(self) -> bool:
        """Whether there is one segment, of numbers as they are."""
        return self.count == 1 and self.values == "none"

    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """The numbers of the segment."""
        own = self._own(sizes, key)
        return code_of(self.values).form([own.stop - own.start], key)

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The numbers of the segment, as they are."""
        part = numbers[self._own(sizes, key)]
        return code_of(self.values).encode(part, [len(part)], key)

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """The numbers of the segment, times N unless there is error feedback; zero elsewhere."""
        own, found = self._own(sizes, key), np.zeros(sum(sizes), dtype=np.float32)
        factor = np.float32(1 if self.error_feedback else min(self.count, sum(sizes)))
        with np.errstate(over="ignore"):
            found[own] = code_of(self.values).decode(arrays, [own.stop - own.start], key) * factor
        return found

    def _own(self, sizes: Sequence[int], key: MessageKey) -> slice:
        """Where the segment of a message is."""
        among = sum(sizes)
        count = min(self.count, among)
        turn = (key.client + key.round) % count
        return slice(among * turn // count, among * (turn + 1) // count)
