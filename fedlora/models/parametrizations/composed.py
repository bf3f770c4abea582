"""Several parametrizations of one layer: their changes add up, and each sees the output of the one before.

So DoRA stretches the rows of whatever else changes a weight, as in DVoRA (Liu et al., "DoRA", ICML 2024).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedlora.core.parametrization import LORA, Factors, Layer, Parametrization
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.core.adapter import Pair


def composed(*forms: Parametrization) -> Parametrization:
    """The parametrization of all of these, the first first; plain LoRA adds nothing to others."""
    parts = tuple(part for form in forms for part in (form.parts if isinstance(form, Composed) else (form,)))
    others = tuple(part for part in parts if part != LORA)
    return Composed(others) if len(others) > 1 else (*others, LORA)[0]


@dataclass(frozen=True)
class Composed(Parametrization):
    """More than one parametrization; at most one of them gives the low-rank term another form than B A.

    Args:
        parts: in the order in which they see the layer's output.
    """

    parts: tuple[Parametrization, ...]

    def __post_init__(self) -> None:
        words = [word for part in self.parts for word in part.factors]
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ConfigError(f"lora.parametrization: two of one layer name a factor '{twice[0]}'")
        own = [part for part in self.parts if part.has_own_low_rank]
        if len(own) > 1:
            names = " and ".join(type(part).__name__ for part in own)
            raise ConfigError(f"lora.parametrization: a layer has one low-rank term, which {names} both give")
        bare = [type(part).__name__ for part in self.parts if not part.pairs]
        if bare and any(part.pairs for part in own):
            raise ConfigError(
                f"lora.parametrization: {type(own[0]).__name__} needs A and B, and {bare[0]} leaves them out"
            )
        object.__setattr__(self, "factors", tuple(words))
        object.__setattr__(self, "pairs", all(part.pairs for part in self.parts))
        for kind in ("peft_names", "peft_options"):
            found = {key: value for part in self.parts for key, value in getattr(part, kind).items()}
            object.__setattr__(self, kind, found)

    def start(self, layer: Layer, fresh: "Pair", rng: np.random.Generator) -> Factors:
        """All that the parts start with."""
        found = {name: t for part in self.parts for name, t in part.start(layer, fresh, rng).items()}
        return {name: tensor for name, tensor in found.items() if self.pairs or name in self.factors}

    def constants(self, layer: Layer, factors: Factors) -> Factors:
        """All that the parts make."""
        return {name: t for part in self.parts for name, t in part.constants(layer, factors).items()}

    def low_rank(self, layer: Layer, factors: Factors) -> tuple[Tensor, Tensor]:
        """That of the part that has its own, or else A and B."""
        return self._low.low_rank(layer, factors)

    def dense(self, layer: Layer, factors: Factors) -> Tensor | None:
        """The sum of the parts' own."""
        found = [change for part in self.parts if (change := part.dense(layer, factors)) is not None]
        return sum(found[1:], found[0]) if found else None

    def output(self, layer: Layer, output: Tensor, factors: Factors, change: Callable[[], Tensor]) -> Tensor:
        """What each part makes of what the one before it has made.

        A part behind one that changes the output is told of that as a change of the weight.
        """
        for part in self.parts:
            output = part.output(layer, output, factors, change)
            if part.changes_output:
                change = partial(_changed, part, layer, factors, change)
        return output

    def weight(self, layer: Layer, weight: Tensor, factors: Factors) -> Tensor:
        """What each part makes of what the one before it has made."""
        for part in self.parts:
            weight = part.weight(layer, weight, factors)
        return weight

    def resize(self, factors: Factors, rank: int) -> Factors:
        """Each part its own."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= part.resize({word: factors[word] for word in part.factors if word in factors}, rank)
        return found

    @property
    def changes_output(self) -> bool:
        """Whether any part does."""
        return any(part.changes_output for part in self.parts)

    @property
    def has_low_rank(self) -> bool:
        """Whether any part does, of those that are not in the place of A and B."""
        return self.pairs or any(part.has_low_rank and not part.pairs for part in self.parts)

    @property
    def is_low_rank(self) -> bool:
        """Whether all parts are."""
        return all(part.is_low_rank for part in self.parts)

    @property
    def rest(self) -> Parametrization:
        """What is left of every part."""
        return composed(*(part.rest for part in self.parts))

    @property
    def _low(self) -> Parametrization:
        own = [part for part in self.parts if part.has_own_low_rank]
        return own[0] if own else LORA


def _changed(part: Parametrization, layer: Layer, factors: Factors, change: Callable[[], Tensor]) -> Tensor:
    """How far a layer's weight is from W₀ once a part has changed it; a constant to the gradient."""
    assert layer.weight is not None
    before = change()
    base = layer.weight().to(before)
    return (part.weight(layer, base + before, factors) - base).detach()
