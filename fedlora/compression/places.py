"""Which numbers of a vector were kept, in few bits: the code of Elias (1974) and Fano (1971).

The k places among n are sorted. Of each, the lower b = ⌊log₂(n / k)⌋ bits are written as they are. The upper
bits form a row of k ones, place i as a one at position (place_i >> b) + i. That makes at most 3 + b bits a
place, whatever the places are; log₂(n choose k) needs about 1.44 + log₂(n / k) where k is small.
"""

from typing import Any

import numpy as np

from fedlora.errors import IncompatibleUpdates


def length_of(count: int, among: int) -> int:
    """The bytes of so many places among so many numbers."""
    low, high = _bits(count, among)
    return (count * low + 7) // 8 + (high + 7) // 8


def write_places(places: Any, among: int) -> Any:
    """Sorted places below `among`, at least one, as bytes.

    Args:
        places: whole numbers, each once, growing.
        among: how many numbers there are.
    """
    low, high = _bits(len(places), among)
    upper = np.zeros(high, dtype=np.uint8)
    upper[(places >> low) + np.arange(len(places))] = 1
    lower = (places[:, None] >> np.arange(low) & 1).astype(np.uint8)
    return np.concatenate([np.packbits(upper), np.packbits(lower)])


def read_places(data: Any, count: int, among: int) -> Any:
    """The places that `write_places` wrote.

    Args:
        data: of the length that `length_of` gives; its content may be anybody's.
        count: how many places there are.
        among: how many numbers there are.

    Raises:
        IncompatibleUpdates: the bytes stand for other places than so many growing ones below `among`.
    """
    low, high = _bits(count, among)
    cut = (high + 7) // 8
    ones = np.flatnonzero(np.unpackbits(data[:cut]))
    if len(ones) != count:
        raise IncompatibleUpdates(f"'places': expected {count} places, got {len(ones)}")
    lower = np.unpackbits(data[cut:])[: count * low].reshape(count, low).astype(np.int64)
    places = (ones - np.arange(count) << low) + (lower << np.arange(low)).sum(axis=1)
    if places[-1] >= among or (np.diff(places) <= 0).any():
        raise IncompatibleUpdates(f"'places': expected growing places below {among}, got others")
    return places


def _bits(count: int, among: int) -> tuple[int, int]:
    """b, and the length of the row of ones."""
    low = (among // count).bit_length() - 1
    return low, count + (among - 1 >> low)
