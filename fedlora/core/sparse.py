"""Sparse updates: values at places that a seed gives, so that only the values are ever sent.

Babakniya et al. "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models". FL@FM-NeurIPS 2023.
https://arxiv.org/abs/2308.06522
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.method import MethodPart
from fedlora.seeds import generator

SPARSE = ".sparse"  # an extra of this ending holds the values of a sparse update of the module before it


@dataclass(frozen=True)
class SparseMask(MethodPart):
    """Where the values of a task's sparse updates go; without it they change nothing.

    Args:
        seed: gives the places (see `places`).
    """

    seed: int


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
