"""How the weight of a linear layer is changed: the interface, which by itself is plain LoRA."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from fedlora.core.method import MethodPart

if TYPE_CHECKING:
    from fedlora.core.adapter import Pair

# The tensors of one layer: A and B where there are any, and others by their words.
Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear layer, as a parametrization sees it.

    Args:
        name: of the module.
        shape: (d_out, d_in).
        weight: gives W₀, (d_out, d_in), in float32 at least, and raises ModelError where it is quantised.
            None where no model is at hand.
        bias: (d_out,), or None.
        base_delta: what is added to the weight of the base besides, dense, (d_out, d_in); 0 for nothing.
    """

    name: str
    shape: tuple[int, int]
    weight: Callable[[], Tensor] | None = None
    bias: Tensor | None = None
    base_delta: Tensor | float = 0.0


@dataclass(frozen=True)
class Parametrization(MethodPart):
    """How a few tensors change a layer's weight W₀. This class itself is LoRA: W₀ + scale · B A.

    A subclass is a frozen dataclass in a file of its own, and overrides what it does otherwise. Its fields
    say what its tensors do not, such as a seed, and travel with every adapter. Its methods are pure.

    The tensors of a layer are A and B, where it has a pair, and others that the class names by words. Those
    lie in `Adapter.extra` under `MODULE.word`: they are trained, and strategies average them as they are.

    Attributes:
        factors: the words, such as ("magnitude",).
        pairs: whether there is a pair A, B too. Without one its own factors are all that is trained.
        peft_names: word -> PEFT's name of that tensor of a module in an adapter's file, for the factors that
            PEFT's LoRA knows.
        peft_options: what PEFT's `LoraConfig` then says besides.
    """

    factors: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[bool] = True
    peft_names: ClassVar[Mapping[str, str]] = {}
    peft_options: ClassVar[Mapping[str, Any]] = {}

    def start(self, layer: Layer, fresh: "Pair", rng: np.random.Generator) -> Factors:
        """The layer's tensors before round 1, with which it does what the base does and can learn.

        Args:
            layer: the layer, with the base's weight.
            fresh: LoRA's own start, or a pair that was given, in the rank and scale of the largest client.
            rng: of this layer alone.

        Returns:
            A and B where `pairs`, and every one of `factors`.
        """
        return {"A": fresh.A, "B": fresh.B}

    def constants(self, layer: Layer, factors: Factors) -> Factors:
        """Tensors that follow from the fields and the layer alone, such as random frozen factors.

        They are made once and handed to the methods below among the factors; they are neither trained nor
        sent. Floating ones come in the dtype of the factors.
        """
        return {}

    def with_constants(self, layer: Layer, factors: Factors) -> dict[str, Tensor]:
        """A layer's factors and the constants, in the factors' dtype and on their device."""
        like = next(iter(factors.values()))
        made = {
            name: tensor.to(like if tensor.is_floating_point() else like.device)
            for name, tensor in self.constants(layer, factors).items()
        }
        return {**factors, **made}

    def low_rank(self, layer: Layer, factors: Factors) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r) of a change scale · B A, where the change has one.

        The scale is the pair's, and 1 without a pair. Differentiable. Where rows get gradients of their own,
        a factor has a dimension before these for the rows, and so may A and B.
        """
        return factors["A"], factors["B"]

    def dense(self, layer: Layer, factors: Factors) -> Tensor | None:
        """A change (d_out, d_in) of the weight that has no low-rank form, differentiable; None without one.

        A class without pairs whose change is this one does not need `low_rank`.
        """
        return None

    def output(self, layer: Layer, output: Tensor, factors: Factors, change: Callable[[], Tensor]) -> Tensor:
        """What becomes of the layer's output once all changes are added; by default nothing else.

        Args:
            layer: the layer.
            output: (rows, ..., d_out), (W₀ + ΔW) x + bias.
            factors: one client's.
            change: gives ΔW, (d_out, d_in), of all that is added; a constant to the gradient.
        """
        return output

    def weight(self, layer: Layer, weight: Tensor, factors: Factors) -> Tensor:
        """The weight (d_out, d_in) of the layer, from W₀ + ΔW: what `output` does, for a merged model.

        Args:
            layer: the layer.
            weight: W₀ + ΔW, float64.
            factors: one client's, float64.
        """
        return weight

    def resize(self, factors: Factors, rank: int) -> Factors:
        """The layer's own factors for a client of a rank: cut, or with room to learn; by default the same.

        Args:
            factors: those that the class names, without A and B.
            rank: of the client's A and B.
        """
        return factors

    @property
    def changes_output(self) -> bool:
        """Whether a layer's output is not only added to."""
        return self._does("output")

    @property
    def has_low_rank(self) -> bool:
        """Whether there is a term scale · B A."""
        return self.pairs or self.has_own_low_rank

    @property
    def has_own_low_rank(self) -> bool:
        """Whether the A and B of that term are others than the pair's."""
        return self._does("low_rank")

    @property
    def is_low_rank(self) -> bool:
        """Whether that term is all that changes, so that the result can be written as LoRA's."""
        return self.has_low_rank and not (self._does("dense") or self.changes_output)

    @property
    def rest(self) -> "Parametrization":
        """What is left of the parametrization once its low-rank term is written as a pair of LoRA's."""
        return LORA if self.is_low_rank else self

    @property
    def by_row(self) -> bool:
        """Whether every row of a batch can have a gradient of its own, as privacy of records needs."""
        return self.is_low_rank

    def change(self, layer: Layer, factors: Factors, scale: float = 1.0) -> Tensor | None:
        """ΔW (d_out, d_in) of all factors and constants of a layer; None where they add nothing."""
        total = None
        if self.has_low_rank and (not self.pairs or "A" in factors):
            A, B = self.low_rank(layer, factors)
            total = scale * B @ A
        dense = self.dense(layer, factors)
        return dense if total is None else total if dense is None else total + dense

    def owns(self, name: str) -> bool:
        """Whether an extra is one of its factors, by the word at the end of the name."""
        return name.rpartition(".")[2] in self.factors

    def _does(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Parametrization, method)


LORA = Parametrization()
