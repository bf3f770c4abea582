"""Which clients train together, and their rows cut into micro-batches of like length: less padding."""

import itertools
from collections.abc import Sequence

from fedlora.data import Example

Micro = list[tuple[int, Example]]


def micro_batches(rows: Micro, tokens: int, padded: bool = True) -> list[Micro]:
    """Cut (slot, row) pairs into lists of like length and at most `tokens` tokens, slot by slot.

    As few lists as possible, and of sizes as even as possible, so that no core waits for another.

    Args:
        rows: in any order.
        tokens: what a list holds at most, if it holds more than one row.
        padded: whether each row counts as long as its list's longest.
    """
    ordered = sorted(rows, key=lambda item: -len(item[1].input_ids))
    lengths = [len(row.input_ids) for _, row in ordered]
    fewest, low, high = len(_cuts(lengths, tokens, padded)), 0, tokens
    while high - low > 1:  # the smallest budget that needs no more lists
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(lengths, middle, padded)) <= fewest else (middle, high)
    spans = itertools.pairwise([*_cuts(lengths, high, padded), len(ordered)])
    return [sorted(ordered[start:stop], key=lambda item: item[0]) for start, stop in spans]


def groups(batches: Sequence[Sequence[Sequence[Example]]], tokens: int) -> list[list[int]]:
    """Cut clients into groups whose steps hold at most `tokens` tokens on the average; most steps first.

    A client of larger batches is alone: it would gain nothing from company. Clients of like numbers of steps
    are together, so that few steps are taken by a part of a group. By the rows alone and never by the cores:
    another grouping adds gradients up in another order.

    Args:
        batches: of each client, in the order of its steps.
        tokens: what a step of a group may hold.
    """
    order = sorted(range(len(batches)), key=lambda slot: -len(batches[slot]))
    found: list[list[int]] = []
    room = 0.0
    for slot in order:
        lengths = [len(row.input_ids) for batch in batches[slot] for row in batch]
        need = sum(lengths) / max(1, len(batches[slot]))
        if not found or need > room:
            found.append([])
            room = float(tokens)
        found[-1].append(slot)
        room -= need
    return [sorted(group) for group in found]


def _cuts(lengths: Sequence[int], tokens: int, padded: bool) -> list[int]:
    """Where lists begin that take as many rows of falling length as there is room for."""
    cuts: list[int] = []
    held = 0
    for i, length in enumerate(lengths):
        held = (i - cuts[-1] + 1) * lengths[cuts[-1]] if padded and cuts else held + length
        if not cuts or held > tokens:
            cuts.append(i)
            held = length
    return cuts
