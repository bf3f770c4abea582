"""What is added to the frozen base besides an adapter, and the increment since the round before."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fedlora.core.adapter import Adapter, Pair, digest
from fedlora.core.algebra import accumulate


@dataclass(frozen=True, eq=False)
class BaseDelta(Mapping[str, Pair]):
    """Module name -> the low-rank change of the base's weight there.

    Tasks and states make one of any mapping. A strategy that adds to the base every round makes the next one
    by `plus`: a client that holds the base delta of the round before is then sent only the increment.

    Args:
        pairs: module -> its change.
        increment: module -> what `pairs` has gained since the round before; empty where it is not known.
    """

    pairs: Mapping[str, Pair] = field(default_factory=dict)
    increment: Mapping[str, Pair] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Mapping[str, Pair]) -> "BaseDelta":
        """A mapping as a base delta; one that is one stays itself, and so keeps its increment and digests."""
        return pairs if isinstance(pairs, cls) else cls(dict(pairs))

    def plus(self, increment: Mapping[str, Pair]) -> "BaseDelta":
        """The base delta after one more round, a function of its bits alone (see `accumulate`).

        The increment is kept in scale 1, as it is sent.
        """
        gained = {module: _in_scale_1(pair) for module, pair in increment.items()}
        grown = {module: accumulate(self.get(module), pair) for module, pair in gained.items()}
        return BaseDelta({**self.pairs, **grown}, gained)

    @cached_property
    def digests(self) -> dict[str, str]:
        """`MODULE.A` and `MODULE.B` -> the digest of that tensor; worked out once for all clients."""
        return {name: digest("", [("", tensor)]) for name, tensor in Adapter(self.pairs).tensors()}

    def __getitem__(self, module: str) -> Pair:
        return self.pairs[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def _in_scale_1(pair: Pair) -> Pair:
    return pair if pair.scale == 1.0 else Pair(pair.A, (pair.B.double() * pair.scale).to(pair.B.dtype), 1.0)
