"""The codes of values by the words of settings: for downloads, and for numbers that sparse codes keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Compression, Form, MessageKey, Numbers
from .bf16 import BF16
from .int8 import Int8
from .nf4 import NF4


@dataclass(frozen=True, kw_only=True)
class Float32(Compression):
    """The numbers as they are."""

    codes_values = True

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """One array of numbers."""
        return {"values": ("float32", (sum(sizes),))}

    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """All of them."""
        return {"values": numbers}

    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """All of them."""
        numbers: Numbers = arrays["values"]
        return numbers


CODES: dict[str, type[Compression]] = {"none": Float32, "bf16": BF16, "int8": Int8, "nf4": NF4}


def code_of(word: str) -> Compression:
    """The code of values that a word of a setting names."""
    return CODES[word]()


def for_downloads(compression: Compression | None) -> Compression | None:
    """What a run's tasks are coded by; None where they are exact."""
    if compression is None or compression.download == "none":
        return None
    if compression.download is None:
        return compression if compression.codes_values and not compression.exact else None
    return code_of(compression.download)


def for_uploads(compression: Compression | None) -> Compression | None:
    """What a run's updates are coded by; None where they travel as they are.

    Where downloads lose something, an update that is exact still travels as a change, since the server has
    other values than the client was sent.
    """
    if compression is None or (compression.exact and for_downloads(compression) is None):
        return None
    return compression
