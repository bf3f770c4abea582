"""One LoRA update and a set of them: plain values that every other part passes around."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora.core.parametrization import LORA, Layer, Parametrization
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

    def factors(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        """Both factors under their names, "A" and "B"."""
        return ("A", self.A), ("B", self.B)


@dataclass(frozen=True)
class Adapter:
    """All that is trained of one model: a pair a target module, and whole tensors such as the head.

    Args:
        pairs: module name -> its pair; kept sorted by name.
        extra: name -> tensor that is trained and averaged as it is, such as a head's parameter, or
            `MODULE.word` for a factor that the parametrization names; kept sorted by name.
        parametrization: how the tensors change the weights.

    Raises:
        IncompatibleUpdates: there are pairs, and the parametrization has none.
    """

    pairs: Mapping[str, Pair]
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    parametrization: Parametrization = LORA

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", dict(sorted(self.pairs.items())))
        object.__setattr__(self, "extra", dict(sorted(self.extra.items())))
        if self.pairs and not self.parametrization.pairs:
            raise IncompatibleUpdates(
                f"expected no pairs A, B beside the factors of {type(self.parametrization).__name__}, got "
                f"{list(self.pairs)[:3]}"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name: `module.A`, `module.B`, then the extras."""
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
        return replace(self, pairs=pairs, extra={n: tensors.get(n, old) for n, old in self.extra.items()})

    def own_factors(self) -> dict[str, dict[str, Tensor]]:
        """Module -> word -> the factors that the parametrization names, without A and B."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.extra.items():
            if self.parametrization.owns(name):
                module, _, word = name.rpartition(".")
                found.setdefault(module, {})[word] = tensor
        return found

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """Module -> all factors of its layer: A and B where it has a pair, and the parametrization's own."""
        pairs = {module: dict(pair.factors()) for module, pair in self.pairs.items()}
        own = self.own_factors()
        return {module: pairs.get(module, {}) | own.get(module, {}) for module in {**pairs, **own}}

    def heads(self) -> dict[str, Tensor]:
        """The extras that are no layer's factors: parameters that are trained whole, such as the head's."""
        return {name: tensor for name, tensor in self.extra.items() if not self.parametrization.owns(name)}

    def plain(self, layer: Callable[[str], Layer] | None = None) -> "Adapter":
        """The same change of every weight, its low-rank term as pairs of LoRA's where it has another form.

        Args:
            layer: gives a module's layer; None where no model is at hand. An adapter without pairs then stays
                as it is, since nobody knows the shapes of its layers.
        """
        form, rest = self.parametrization, self.parametrization.rest
        if rest == form or not rest.pairs or (layer is None and not form.pairs):
            return self
        pairs = {}
        for module, factors in self.factors().items():
            pair = self.pairs.get(module)
            if layer is not None:
                at = layer(module)
            elif pair is not None:
                at = Layer(module, pair.shape)
            else:
                continue
            whole = form.with_constants(at, factors)
            A, B = form.low_rank(
                at, {n: t.double() if t.is_floating_point() else t for n, t in whole.items()}
            )
            dtype = next(iter(factors.values())).dtype
            pairs[module] = Pair(A.to(dtype), B.to(dtype), pair.scale if pair else 1.0)
        left = {name: tensor for name, tensor in self.extra.items() if rest.owns(name)}
        return Adapter(pairs, self.heads() | left, rest)

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
        form = "" if self.parametrization == LORA else repr(self.parametrization)
        return digest(scales + form, self.tensors())


def digest(header: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a header, and over the names, shapes, dtypes and bytes of tensors, in their order."""
    seal = hashlib.sha256(header.encode())
    for name, tensor in tensors:
        seal.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        seal.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seal.hexdigest()
