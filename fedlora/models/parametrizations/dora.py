"""DoRA: the length of every row of a weight is trained by itself, LoRA moves the directions.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen. "DoRA: Weight-Decomposed Low-Rank Adaptation". ICML 2024.
https://arxiv.org/abs/2402.09353

    W' = m ⊙ V / ‖V‖_row,    V = W₀ + ΔW,    m = ‖V‖_row at the start

ΔW is all that is added to the weight: the pair, the base delta, and the change of another
parametrization beside this one. As in §4.3 of the paper ‖V‖ is a constant to the gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlora.core.algebra import dense
from fedlora.core.parametrization import Factors, Layer, Parametrization

if TYPE_CHECKING:
    from fedlora.core.adapter import Pair


@dataclass(frozen=True)
class DoRA(Parametrization):
    """LoRA's pair, and "magnitude" m (d_out,). A layer without magnitudes is one of plain LoRA."""

    factors = ("magnitude",)
    peft_names: ClassVar = {"magnitude": "lora_magnitude_vector"}
    peft_options: ClassVar = {"use_dora": True}

    def start(self, layer: Layer, fresh: "Pair", rng: np.random.Generator) -> Factors:
        """The magnitudes with which the pair does what it does without them."""
        return {"A": fresh.A, "B": fresh.B, "magnitude": _lengths(layer, dense(fresh) + layer.base_delta)}

    def output(self, layer: Layer, output: Tensor, factors: Factors, change: Callable[[], Tensor]) -> Tensor:
        """M / ‖V‖ ⊙ V x + bias, from V x + bias."""
        if "magnitude" not in factors:
            return output
        ratio = factors["magnitude"] / _lengths(layer, change())
        plain = output if layer.bias is None else output - layer.bias
        stretched = plain * ratio
        return (stretched if layer.bias is None else stretched + layer.bias).to(output.dtype)

    def weight(self, layer: Layer, weight: Tensor, factors: Factors) -> Tensor:
        """M ⊙ V / ‖V‖_row."""
        if "magnitude" not in factors:
            return weight
        return weight * (factors["magnitude"] / _norms(weight))[:, None]


def _lengths(layer: Layer, change: Tensor) -> Tensor:
    """‖W₀ + ΔW‖_row, (d_out,), above zero, in the dtype of ΔW.

    Raises:
        ModelError: a quantised weight.
    """
    assert layer.weight is not None
    return _norms(layer.weight().to(change) + change)


def _norms(V: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(V, dim=1)
    return norms.clamp_min(torch.finfo(V.dtype).tiny)
