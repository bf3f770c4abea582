"""Sparse updates: values at places that a seed gives, so that only the values are ever sent.

Babakniya et al. "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models". FL@FM-NeurIPS 2023.
https://arxiv.org/abs/2308.06522
"""

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlora.core.parametrization import Factors, Layer, Parametrization
from fedlora.seeds import generator

if TYPE_CHECKING:
    from fedlora.core.adapter import Pair


@dataclass(frozen=True)
class Sparse(Parametrization):
    """One factor "sparse", the values (n,) of an update that is zero elsewhere.

    Args:
        seed: gives the places (see `places`).
    """

    seed: int = 0

    factors = ("sparse",)
    pairs = False

    def start(self, layer: Layer, fresh: "Pair", rng: np.random.Generator) -> Factors:
        """As many zeros as the pair has numbers."""
        count = min(fresh.rank * sum(layer.shape), layer.shape[0] * layer.shape[1])
        return {"sparse": fresh.A.new_zeros(count)}

    def constants(self, layer: Layer, factors: Factors) -> Factors:
        """The flat indices of the values."""
        return {"places": places(self.seed, layer.name, layer.shape, len(factors["sparse"]))}

    def dense(self, layer: Layer, factors: Factors) -> Tensor:
        """The matrix with the values at their places."""
        return spread(factors["sparse"], factors["places"], layer.shape)


def places(seed: int, module: str, shape: tuple[int, int], count: int) -> Tensor:
    """Flat indices (count,) into a (d_out, d_in) matrix, sorted, uniform without repetition.

    A function of its arguments alone: the same for every client, in every process, and no data goes in.
    """
    rng = generator(seed, "mask", zlib.crc32(module.encode()))
    chosen = rng.choice(shape[0] * shape[1], count, replace=False, shuffle=False)
    chosen.sort()
    return torch.from_numpy(chosen)


def spread(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The (d_out, d_in) matrix that has the values at their places and is zero elsewhere; differentiable."""
    return values.new_zeros(shape[0] * shape[1]).index_put((indices,), values).view(shape)
