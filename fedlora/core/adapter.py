"""One LoRA update and a set of them: plain values that every other part passes around."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
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
        M: (rank, rank), a core between frozen factors: ΔW = scale · B @ M @ A (PrivateLoRA, arXiv
            2311.14030); None is the identity.

    Raises:
        IncompatibleUpdates: the factors do not fit each other, or the scale is not a finite number.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    M: Tensor | None = None

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
        if self.M is not None and (self.M.shape != (self.rank, self.rank) or self.M.dtype != self.A.dtype):
            raise IncompatibleUpdates(
                f"expected a core M {(self.rank, self.rank)} of {self.A.dtype}, got {tuple(self.M.shape)} of "
                f"{self.M.dtype}"
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

    def factors(self) -> Iterator[tuple[str, Tensor]]:
        """The factors under their names, "A", "B" and, where there is one, "M"."""
        yield from (("A", self.A), ("B", self.B))
        if self.M is not None:
            yield "M", self.M

    def plain(self) -> "Pair":
        """The same ΔW without a core, which goes into B."""
        if self.M is None:
            return self
        B = (self.B.double() @ self.M.double()).to(self.B.dtype)
        return Pair(self.A, B, self.scale)


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
        """Every tensor under its name: `module.A`, `module.B`, `module.M`, then the extras."""
        for name, pair in self.pairs.items():
            yield from ((f"{name}.{factor}", tensor) for factor, tensor in pair.factors())
        yield from self.extra.items()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Adapter":
        """The adapter with other tensors under these names; the rest of it and all scales stay.

        Args:
            tensors: name, as `tensors` has it, -> the tensor that takes that place.

        Raises:
            IncompatibleUpdates: the adapter has no tensor of a name, or the factors of a pair no longer fit.
        """
        if unknown := sorted(tensors.keys() - {name for name, _ in self.tensors()}):
            raise IncompatibleUpdates(f"expected tensors of this adapter, got {unknown[:3]}, which it lacks")
        pairs = {
            module: Pair(
                scale=pair.scale, **{f: tensors.get(f"{module}.{f}", old) for f, old in pair.factors()}
            )
            for module, pair in self.pairs.items()
        }
        return Adapter(pairs, {name: tensors.get(name, old) for name, old in self.extra.items()})

    def top_down(self) -> list[str]:
        """The modules from the top layer down: by the numbers in their paths, falling, then by name.

        A module without a number, such as a pooler, belongs to no layer and counts as above them.
        """

        def place(name: str) -> tuple[list[float], str]:
            return [-float(part) for part in name.split(".") if part.isdigit()] or [-math.inf], name

        return sorted(self.pairs, key=place)

    def digest(self) -> str:
        """SHA-256 over names, scales, shapes, dtypes and bytes: equal if and only if the adapters are."""
        scales = "".join(f"{name}={pair.scale!r};" for name, pair in self.pairs.items())
        return digest(scales, self.tensors())


def digest(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a header, and over the names, shapes, dtypes and bytes of tensors, in their order."""
    seal = hashlib.sha256(header.encode())
    for name, tensor in tensors:
        seal.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        seal.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()
