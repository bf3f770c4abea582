"""The order of names as a reader counts: 2 before 10, and part-2 before part-10."""

import re
from collections.abc import Iterable

INTEGER = re.compile(r"[+-]?[0-9]{1,300}")  # int() refuses thousands of digits


def in_order(names: Iterable[str]) -> list[str]:
    """Names in their order: by value where all of them are integers, else by words and the numbers in them.

    Args:
        names: labels, clients or file names; each is kept, repeated ones too.
    """
    found = list(names)
    if all(INTEGER.fullmatch(name) for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found, key=natural)


def natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key to sort by: runs of digits compare as numbers, all else as text; equal ones as plain text."""
    pieces = re.split(r"([0-9]+)", name)  # text and digits in turn, text first
    counted = [
        (len(piece.lstrip("0")), piece.lstrip("0")) if at % 2 else (0, piece)
        for at, piece in enumerate(pieces)
    ]
    return counted, name
