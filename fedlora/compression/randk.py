"""Random-k: numbers of a change at random places, which are the same for all clients of a round.

Konečný, McMahan, Yu, Richtárik, Suresh, Bacon. "Federated Learning: Strategies for Improving Communication
Efficiency". 2016. https://arxiv.org/abs/1610.05492, section 2, "random mask". With M the k places of a round,
drawn from n:

    x̂_i = (n / k) x_i for i in M, else 0,    E x̂ = x

The places follow from the run's seed and the round, so they do not travel. Each client sends the same ones,
so they can be summed under masks.

Differs from the paper: with error feedback the factor n / k is left out, since what is not sent now is sent
later. It would be counted twice, and x - x̂ could grow without bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.ranges import check_number

from .base import Compression, Form, MessageKey, Numbers, check_word
from .topk import kept
from .words import code_of


@dataclass(frozen=True, kw_only=True)
class RandK(Compression):
    """k numbers at places that all clients of a round have in common.

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
        """The numbers that are kept."""
        return code_of(self.values).form([kept(self.density, sizes)], key)

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The numbers at the places of the round, as they are."""
        at = self._places(sizes, key)
        return code_of(self.values).encode(numbers[at], [len(at)], key)

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """Each number that was kept, times n / k unless there is error feedback; zero elsewhere."""
        among = sum(sizes)
        at, found = self._places(sizes, key), np.zeros(among, dtype=np.float32)
        factor = np.float32(1 if self.error_feedback else among / len(at))
        with np.errstate(over="ignore"):
            found[at] = code_of(self.values).decode(arrays, [len(at)], key) * factor
        return found

    def _places(self, sizes: Sequence[int], key: MessageKey) -> Any:
        return common_places(kept(self.density, sizes), sum(sizes), key)


def common_places(count: int, among: int, key: MessageKey) -> Any:
    """The places of a round, growing; the same ones for all its clients.

    Args:
        count: how many.
        among: how many numbers there are.
        key: of a message of the round.
    """
    if count == among:
        return np.arange(among)
    return np.sort(key.common().choice(among, count, replace=False, shuffle=False))
