"""Which client has which LoRA rank."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.errors import ConfigError
from fedlora.seeds import generator


def assign_ranks(ranks: Any, clients: int, seed: int) -> list[int]:
    """Each client's rank.

    Args:
        ranks: a number for all; a list, taken in turn; or rank -> share, whose parts are dealt at random.
        clients: how many.
        seed: of the deal.

    Raises:
        ConfigError: something that is no rank, or shares that add up to nothing.
    """
    if isinstance(ranks, Mapping):
        try:
            shares = {_rank(rank): float(share) for rank, share in ranks.items()}
        except (TypeError, ValueError):
            shares = {}
        total = sum(shares.values())
        if not 0 < total < math.inf or min(shares.values()) < 0:
            raise ConfigError(
                f"ranks: expected shares above 0, such as {{8: 0.5, 2: 0.5}}, got {dict(ranks)}"
            )
        ends = [round(sum(list(shares.values())[: i + 1]) / total * clients) for i in range(len(shares))]
        sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
        dealt = [rank for rank, size in zip(shares, sizes, strict=True) for _ in range(size)]
        return [int(rank) for rank in generator(seed, "ranks").permutation(dealt)]
    listed = isinstance(ranks, Sequence) and not isinstance(ranks, str)
    turns = [_rank(rank) for rank in (ranks if listed else [ranks])]
    if not turns:
        raise ConfigError("ranks: expected at least one rank, got an empty list")
    return [turns[client % len(turns)] for client in range(clients)]


def _rank(value: Any) -> int:
    try:
        rank = int(value)
    except (TypeError, ValueError, OverflowError):
        rank = 0
    if rank < 1 or rank != float(value):
        raise ConfigError(f"ranks: expected whole numbers of at least 1, got {value!r}")
    return rank
