"""One LoRA update and a set of them: plain values that every other part passes around."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.errors import IncompatibleUpdates


@dataclass(frozen=True)
class Pair:
    """The update of one linear layer, ΔW = scale · B @ A (Hu et al., ICLR 2022, arXiv:2106.09685).

    Scale travels with the factors: two pairs of different rank or alpha can only be combined through it, and
    no part of fedlora infers it from shapes.

    Args:
        A: (rank, d_in).
        B: (d_out, rank).
        scale: the factor s, alpha / rank in PEFT's terms (alpha / √rank with rsLoRA).

    Raises:
        IncompatibleUpdates: the factors do not fit each other, or the scale is not a finite number.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise IncompatibleUpdates(
                f"expected A (rank, d_in) and B (d_out, rank), got A {tuple(self.A.shape)} and "
                f"B {tuple(self.B.shape)}"
            )
        if self.A.dtype != self.B.dtype or self.A.device != self.B.device:
            raise IncompatibleUpdates(
                f"expected A and B of one dtype and device, got {self.A.dtype} on {self.A.device} and "
                f"{self.B.dtype} on {self.B.device}"
            )
        object.__setattr__(self, "scale", float(self.scale))
        if not math.isfinite(self.scale):
            raise IncompatibleUpdates(f"expected a finite scale, got {self.scale}")

    @property
    def rank(self) -> int:
        """The number of rows of A, which bounds the rank of ΔW."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of ΔW and of the layer's weight."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class Adapter:
    """All that is trained of one model: a pair a target module, and whole tensors such as the head.

    Args:
        pairs: module name -> its pair; kept sorted by name.
        extra: parameter name -> tensor that is trained and averaged as it is; kept sorted by name.
    """

    pairs: Mapping[str, Pair]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", dict(sorted(self.pairs.items())))
        object.__setattr__(self, "extra", dict(sorted(self.extra.items())))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name: `module.A`, `module.B`, then the extras."""
        for name, pair in self.pairs.items():
            yield f"{name}.A", pair.A
            yield f"{name}.B", pair.B
        yield from self.extra.items()

    def digest(self) -> str:
        """SHA-256 over names, scales, shapes, dtypes and bytes: equal if and only if the adapters are."""
        seal = hashlib.sha256()
        for name, pair in self.pairs.items():
            seal.update(f"{name}={pair.scale!r};".encode())
        for name, tensor in self.tensors():
            seal.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            seal.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return seal.hexdigest()
