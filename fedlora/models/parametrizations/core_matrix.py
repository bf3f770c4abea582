"""A core matrix between the two factors of LoRA: ΔW = scale · B C A, C (r, r).

PrivateLoRA freezes A and B and trains the core alone, r² numbers whatever the layer's size: Wang, Lin, Zeng,
Zhang. "PrivateLoRA For Efficient Privacy Preserving LLM". 2023. https://arxiv.org/abs/2311.14030
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlora.core.parametrization import Factors, Layer, Parametrization

if TYPE_CHECKING:
    from fedlora.core.adapter import Pair


@dataclass(frozen=True)
class CoreMatrix(Parametrization):
    """LoRA's pair with a square factor "core" in the middle."""

    factors = ("core",)

    def start(self, layer: Layer, fresh: "Pair", rng: np.random.Generator) -> Factors:
        """A and B as they are and the identity between them."""
        return {"A": fresh.A, "B": fresh.B, "core": torch.eye(fresh.rank).to(fresh.A)}

    def low_rank(self, layer: Layer, factors: Factors) -> tuple[Tensor, Tensor]:
        """A, and B C."""
        return factors["A"], factors["B"] @ factors["core"]

    def resize(self, factors: Factors, rank: int) -> Factors:
        """The first r rows and columns of the core; zeros beyond those that there are."""
        core = factors["core"]
        more = max(0, rank - len(core))
        return {"core": torch.nn.functional.pad(core, (0, more, 0, more))[:rank, :rank].contiguous()}
