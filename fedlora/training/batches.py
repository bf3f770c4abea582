"""Which clients train together, and their rows cut into micro-batches of like length: less padding.

Where the user names no size, it follows from the rows alone. It must not follow from the number of cores:
other micro-batches add gradients up in another order, and a run's bytes are the same on every machine. So the
size has to do for few cores and for many. A micro-batch goes through all the model's weights, which costs as
much as C tokens whatever it holds (about 22 with MiniLM). n micro-batches of a step of S tokens thus take
S + n C on one core and S / n + C on n cores. With n that grows as √S the first stays near S, and the second
falls as S grows.
"""

import itertools
from collections.abc import Sequence

from fedlora.data import Example
from fedlora.models import Traits

Micro = list[tuple[int, Example]]


TOGETHER = 512  # tokens of a step of clients that train together, on a CPU
MANY = 8  # groups of clients from which on a micro-batch holds as many tokens as a group's step
LARGEST = 1024  # tokens of a micro-batch on a CPU, on the average over a step's: larger ones gain no more
SMALLEST_SPLIT = 64  # tokens of a step below which a second micro-batch costs more than a second core saves


def count(tokens: int) -> int:
    """How many micro-batches a step of so many tokens is cut into on a CPU.

    2 from 64 tokens on, 4 from 1,024, 8 from 4,096: powers of two, which 2, 4 or 8 cores share evenly. Beyond
    8,192 as many as it takes for 1,024 tokens each.
    """
    if tokens < SMALLEST_SPLIT:
        return 1
    return max(2, 1 << ((tokens // 64).bit_length() - 1) // 2, -(-tokens // LARGEST))


def micro_batches(
    rows: Micro, tokens: int | None, traits: Traits, padded: bool = True, most: int | None = None
) -> list[Micro]:
    """Cut (slot, row) pairs into lists of like length, slot by slot.

    Their sizes are as even as possible, so that no core waits for another.

    Args:
        rows: in any order.
        tokens: what a list holds at most, if it holds more than one row; there are as few lists as that
            allows. None makes as many lists as `count` says, or fewer.
        traits: of the model, which say what rows may be together.
        padded: whether each row counts as long as its list's longest.
        most: rows that a list may hold; None for any number.
    """
    ordered = sorted(rows, key=lambda item: -item[1].size)
    lengths = [row.size for _, row in ordered]
    if tokens is None:
        high = sum(lengths[:1]) * len(lengths)
        fewest = max(count(sum(lengths)), len(_cuts(lengths, high, traits, padded, most)))
    else:
        fewest, high = len(_cuts(lengths, tokens, traits, padded, most)), tokens
    low = 0
    while high - low > 1:  # the smallest budget that needs no more lists
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_cuts(lengths, middle, traits, padded, most)) <= fewest else (middle, high)
        )
    spans = itertools.pairwise([*_cuts(lengths, high, traits, padded, most), len(ordered)])
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
        lengths = [row.size for batch in batches[slot] for row in batch]
        need = sum(lengths) / max(1, len(batches[slot]))
        if not found or need > room:
            found.append([])
            room = float(tokens)
        found[-1].append(slot)
        room -= need
    return [sorted(group) for group in found]


def _cuts(lengths: Sequence[int], tokens: int, traits: Traits, padded: bool, most: int | None) -> list[int]:
    """Where lists begin that take as many rows of falling length as there is room for."""
    cuts: list[int] = []
    held = 0
    for i, length in enumerate(lengths):
        held = (i - cuts[-1] + 1) * lengths[cuts[-1]] if padded and cuts else held + length
        full = held > tokens or (cuts and i - cuts[-1] == most)
        if not cuts or full or not traits.together(lengths[cuts[-1]], length):
            cuts.append(i)
            held = length
    return cuts


def steps_of_pass(
    rows: list[Example], step_rows: int, max_tokens: int | None, accumulate: int
) -> list[list[Example]]:
    """The rows of one pass over a client's rows, step by step.

    Args:
        rows: in the order of the pass.
        step_rows: how many rows a step has; the last step of a pass may have fewer.
        max_tokens: how many tokens a batch holds at most, if it holds more than one row; `step_rows` then
            says nothing. None for no bound.
        accumulate: how many batches of `max_tokens` a step has.
    """
    if max_tokens is None:
        return [rows[start : start + step_rows] for start in range(0, len(rows), step_rows)]
    cuts, held = [0], 0
    for at, row in enumerate(rows):
        if held + row.size > max_tokens and at > cuts[-1]:
            cuts, held = [*cuts, at], 0
        held += row.size
    ends = [*cuts[::accumulate], len(rows)]
    return [rows[start:stop] for start, stop in itertools.pairwise(ends)]
