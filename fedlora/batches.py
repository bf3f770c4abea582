"""Rows of several clients cut into micro-batches of like length, which removes most padding."""

import itertools
from collections.abc import Sequence

from fedlora.data import Example

Micro = list[tuple[int, Example]]


def micro_batches(rows: Micro, tokens: int) -> list[Micro]:
    """Cut (slot, row) pairs into lists of like length and at most `tokens` padded tokens, slot by slot.

    As few lists as possible, and of sizes as even as possible, so that no core waits for another.
    """
    ordered = sorted(rows, key=lambda item: -len(item[1].input_ids))
    lengths = [len(row.input_ids) for _, row in ordered]
    fewest, low, high = len(_cuts(lengths, tokens)), 0, tokens
    while high - low > 1:  # the smallest budget that needs no more lists
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(lengths, middle)) <= fewest else (middle, high)
    spans = itertools.pairwise([*_cuts(lengths, high), len(ordered)])
    return [sorted(ordered[start:stop], key=lambda item: item[0]) for start, stop in spans]


def _cuts(lengths: Sequence[int], tokens: int) -> list[int]:
    """Where lists begin that take as many rows of falling length as their first, the longest, allows."""
    cuts: list[int] = []
    for i in range(len(lengths)):
        if not cuts or (i - cuts[-1] + 1) * lengths[cuts[-1]] > tokens:
            cuts.append(i)
    return cuts
