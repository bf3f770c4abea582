"""Two parametrizations as an author writes them, by public names alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import fedlora as fl
from fedlora.models.parametrizations import Layer, Parametrization


@dataclass(frozen=True)
class VeRA(Parametrization):
    """ΔW = diag(b) B diag(d) A, with A and B random and frozen (Kopiczko, Blankevoort, Asano, ICLR 2024)."""

    seed: int = 0
    rank: int = 16

    factors = ("d", "b")
    pairs = False

    def start(self, layer: Layer, fresh: fl.Pair, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"d": torch.full((self.rank,), 0.1), "b": torch.zeros(layer.shape[0])}

    def constants(self, layer: Layer, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        d_out, d_in = layer.shape
        rng = np.random.default_rng([self.seed, d_out, d_in])  # one A and B for all layers of a shape
        A, B = rng.standard_normal((self.rank, d_in)), rng.standard_normal((d_out, self.rank))
        return {"A": torch.from_numpy(A / d_in**0.5), "B": torch.from_numpy(B / self.rank**0.5)}

    def low_rank(self, layer: Layer, factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return factors["d"][..., :, None] * factors["A"], factors["b"][..., :, None] * factors["B"]


@dataclass(frozen=True)
class FourierFT(Parametrization):
    """ΔW = scale · Re(IFFT2(F)), F sparse with n learnt entries (Gao et al., ICML 2024)."""

    n: int = 12
    scale: float = 30.0

    factors = ("spectrum",)
    pairs = False

    def start(self, layer: Layer, fresh: fl.Pair, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"spectrum": torch.zeros(self.n)}

    def constants(self, layer: Layer, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        rng = np.random.default_rng([5, *layer.shape])
        return {"entries": torch.from_numpy(rng.choice(layer.shape[0] * layer.shape[1], self.n, False))}

    def dense(self, layer: Layer, factors: dict[str, Tensor]) -> Tensor:
        values = factors["spectrum"]
        flat = values.new_zeros(layer.shape[0] * layer.shape[1]).index_put((factors["entries"],), values)
        return self.scale * torch.fft.ifft2(flat.view(layer.shape)).real
