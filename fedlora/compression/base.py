"""The interface of compression: how the numbers of one message travel."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ConfigError
from fedlora.seeds import generator

Form = dict[str, tuple[str, tuple[int, ...]]]  # name of an array -> its dtype and shape
Numbers = NDArray[np.float32]
WORDS = ("none", "bf16", "int8", "nf4")  # of `download` and of `values`


@dataclass(frozen=True)
class MessageKey:
    """Which message is coded; what is random about its code follows from this.

    Args:
        seed: the run's.
        client: who sends or receives it.
        round: the round, from 1.
        down: whether it goes to the client.
    """

    seed: int
    client: int
    round: int
    down: bool = False

    def own(self) -> np.random.Generator:
        """Random numbers of this message alone."""
        purpose = "compression of a download" if self.down else "compression of an update"
        return generator(self.seed, purpose, self.client, self.round)

    def common(self) -> np.random.Generator:
        """Random numbers that all clients of the round have in common."""
        return generator(self.seed, "places of a round", 0, self.round)


@dataclass(frozen=True, kw_only=True)
class Compression(ABC):
    """How the numbers of a message travel, in fewer bytes than 4 each.

    An upload holds the change of what a client was sent, and the server adds the change to what it sent. So a
    client that has learned nothing moves nothing, and what a download loses is not in the state. A download
    holds the values that the client is to train. What is sent once and then held, such as frozen factors and
    base deltas, is always exact.

    A codec is a frozen dataclass of its settings. It sees a message as one vector, the tensors one after the
    other, and is pure: the same numbers under the same key give the same arrays on every machine.

    Args:
        error_feedback: whether a client adds to its next change what its messages have lost so far. It needs
            a strategy whose factors keep their basis (`Strategy.fixed_basis`).
        download: what the tasks are coded by: none, bf16, int8 or nf4. None is the codec itself where it can
            code values, else none.
    """

    codes_values: ClassVar[bool] = False  # whether it serves downloads, too: it drops no number
    error_feedback: bool = False
    download: str | None = None

    def __post_init__(self) -> None:
        check_word("compression.download", self.download, none=True)

    @property
    def exact(self) -> bool:
        """Whether nothing is lost, so that uploads travel as they would without it."""
        return False

    @abstractmethod
    def form(self, sizes: Sequence[int], key: MessageKey) -> Form:
        """The arrays of a message, by name.

        Args:
            sizes: how many numbers each tensor of the message has; at least one in all.
            key: which message it is.
        """

    @abstractmethod
    def encode(self, numbers: Numbers, sizes: Sequence[int], key: MessageKey) -> dict[str, Any]:
        """The arrays that travel, in this form.

        Args:
            numbers: of all tensors, float32, one after the other. If one is not finite, so is one of those
                that `decode` gives.
            sizes: as for `form`.
            key: as for `form`.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Any], sizes: Sequence[int], key: MessageKey) -> Numbers:
        """The numbers that arrays stand for, float32.

        Args:
            arrays: of the dtypes and shapes that `form` gives. Their content may be anybody's.
            sizes: as for `form`.
            key: as for `form`.

        Raises:
            IncompatibleUpdates: `encode` makes no such arrays; names the array.
        """


def check_word(name: str, word: Any, none: bool = False) -> None:
    """Refuse what names no code of values.

    Raises:
        ConfigError: names the setting, what was expected and what came.
    """
    if not ((none and word is None) or word in WORDS):
        raise ConfigError(f"{name}: expected {', '.join(WORDS[:-1])} or {WORDS[-1]}, got {word!r}")


def block_starts(sizes: Sequence[int], block: int) -> Any:
    """Where blocks of so many numbers begin; none reaches from one tensor into the next."""
    ends = np.cumsum(sizes)
    return np.concatenate([np.arange(end - size, end, block) for end, size in zip(ends, sizes, strict=True)])


def by_blocks(numbers: Any, sizes: Sequence[int], block: int) -> tuple[Any, Any]:
    """The numbers over the largest magnitude of their block, float64; and these magnitudes, float32."""
    starts = block_starts(sizes, block)
    most = np.maximum.reduceat(np.abs(numbers), starts)
    wide = spread(np.where(most == 0, np.float32(1), most), starts, len(numbers))
    with np.errstate(invalid="ignore"):  # infinity over infinity: the scale says it all
        return numbers.astype(np.float64) / wide, most


def scaled(shares: Any, scales: Any, sizes: Sequence[int], block: int) -> Numbers:
    """The inverse of `by_blocks`, whatever the scales are."""
    with np.errstate(invalid="ignore", over="ignore"):
        wide = spread(scales, block_starts(sizes, block), len(shares))
        numbers: Numbers = (shares * wide).astype(np.float32)
        return numbers


def spread(scales: Any, starts: Any, length: int) -> Any:
    """Each block's scale at every one of its numbers, float64."""
    return np.repeat(scales.astype(np.float64), np.diff(np.append(starts, length)))
