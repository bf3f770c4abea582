"""The low-rank factors of K clients in a few tensors: one product, one optimizer's step for all of them.

A client is a row of each tensor; its factors lie in it one after the other, those of all clients at the same
place. Ranks are padded with zeros up to the largest, and to a multiple of 8. The padding is inert: it adds
nothing to an output and gets no gradient. Gradients are added up in place, in a tensor of the same form, so
that autograd keeps none of them. Products are computed in the model's precision, from a copy that is made
anew when the factors have moved; the factors themselves stay as precise as they came.

For DP-SGD each row has a gradient of its own. Those of a batch are one matrix, a row each, in which the
factors lie as in a client's row of the tensors. A row's gradient of a layer is the product of its own tokens'
numbers, grouped by rows as the others are by clients: r (d_in + d_out) numbers, fewer than its activations
if it has more tokens than the rank. So they are made and not only their norms.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedlora.core.adapter import Adapter
from fedlora.models.pack import upload
from fedlora.models.per_row import RowGradients
from fedlora.models.products import OneByOne, Parts, Products

ROUND = 8  # a rank is padded to a multiple of it, so that every matrix begins where a GPU can read it at once
FIXED = "fixed"  # the tensor of all factors that are not trained


@dataclass(frozen=True)
class _Place:
    """Where a factor lies in each row of a tensor."""

    tensor: str
    start: int
    shape: tuple[int, int]

    def of(self, whole: Tensor) -> Tensor:
        """The factor of all slots, (slots, *shape)."""
        part = whole[:, self.start : self.start + self.shape[0] * self.shape[1]]
        return part.view(len(whole), *self.shape)


class Stacks:
    """The factors of some adapters, on a device.

    Args:
        adapters: one a slot, of the same modules.
        trained: the names of what is trained, as `Adapter.tensors` has them; the same for all slots.
        device: where the model is.
        dtype: in which products are computed.
        products: how.
        by_row: whether each row has a gradient of its own, in the batch's `RowGradients`.

    Attributes:
        values: "A" and "B" -> the factors that are trained, (slots, all of a slot's factors and padding).
        anchor: what a loss is differentiated by, so that gradients come past every layer.
        reached: the modules whose gradients have come past.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        trained: Collection[str],
        device: torch.device,
        dtype: torch.dtype,
        products: Products,
        by_row: bool = False,
    ) -> None:
        self._adapters, self._trained = adapters, frozenset(trained)
        self._products = OneByOne() if len(adapters) == 1 else products
        self._outer = products if by_row else self._products
        self._places, widths = _layout(adapters, self._trained)
        self._precise = next(iter(adapters[0].pairs.values())).A.dtype
        whole = {
            name: torch.zeros(len(adapters), width, dtype=self._precise, device=device)
            for name, width in widths.items()
        }
        for slot, adapter in enumerate(adapters):
            for name, row in _rows(adapter, self._places, widths).items():
                whole[name][slot].copy_(row)
        self.values = {name: nn.Parameter(whole[name]) for name in sorted(whole) if name != FIXED}
        for parameter in self.values.values():
            parameter.grad = torch.zeros_like(parameter)
        self._compute = {name: found.to(dtype) for name, found in whole.items()}
        self._scales = {m: tuple(a.pairs[m].scale for a in adapters) for m in adapters[0].pairs}
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.reached: set[str] = set()

    @property
    def silent(self) -> int:
        """How many trained tensors of a slot no gradient has come to."""
        return sum(
            name.rsplit(".", 1)[0] not in self.reached for name in self._trained if name in self._places
        )

    def parameters(self, slot: int) -> dict[str, dict[str, nn.Parameter]]:
        """Module -> "A" and "B" of a slot: windows on the tensors of all, with windows on the gradients."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        for module, pair in self._adapters[slot].pairs.items():
            for factor, tensor in pair.factors():
                place = self._places[f"{module}.{factor}"]
                whole = self.values.get(place.tensor)
                if whole is None:
                    own = nn.Parameter(tensor.detach(), requires_grad=False)
                else:
                    own = nn.Parameter(_cut(place.of(whole.detach())[slot], tensor.shape))
                    assert whole.grad is not None
                    own.grad = _cut(place.of(whole.grad)[slot], tensor.shape)
                found.setdefault(module, {})[factor] = own
        return found

    def row_gradients(self, rows: int, more: int) -> RowGradients:
        """Room for the gradients of so many rows, with so many numbers more than those of the factors."""
        widths = {name: value.shape[1] for name, value in self.values.items()}
        return RowGradients(rows, widths, more, self.anchor.device, self._precise)

    def indices(self) -> list[Tensor | None]:
        """Where each slot's numbers lie in its row of all trained factors, in the order of its parameters.

        First those of A, then those of B, module by module, without the padding. None of a slot whose numbers
        fill its row in this order. Slots of the same ranks share a tensor.
        """
        widths = [value.shape[1] for value in self.values.values()]
        every = torch.arange(sum(widths))
        numbers = dict(zip(self.values, torch.split(every, widths), strict=True))
        made: dict[tuple[int, ...], Tensor | None] = {}
        ranks = [tuple(pair.rank for pair in adapter.pairs.values()) for adapter in self._adapters]
        for key, adapter in zip(ranks, self._adapters, strict=True):
            if key not in made:
                own = torch.cat(
                    [
                        _cut(place.of(numbers[name][None])[0], tensor.shape).reshape(-1)
                        for name in self.values
                        for module, pair in adapter.pairs.items()
                        for factor, tensor in pair.factors()
                        if factor == name and (place := self._places[f"{module}.{factor}"]).tensor == name
                    ]
                    or [every]
                )
                made[key] = None if torch.equal(own, every) else upload(own, self.anchor.device)
        return [made[key] for key in ranks]

    def add(
        self,
        output: Tensor,
        x: Tensor,
        module: str,
        parts: Parts,
        rows: tuple[RowGradients, Parts] | None = None,
    ) -> Tensor:
        """Add scale · x Aᵀ Bᵀ to a layer's output in place, each slot's rows through its own factors.

        Args:
            output: (..., d_out), which nothing else holds.
            x: (..., d_in), the layer's input.
            module: the layer.
            parts: how the rows of both lie.
            rows: where each row's own gradient goes, and how many of the rows of `x` it has.
        """
        A, B = self._places[f"{module}.A"], self._places[f"{module}.B"]
        even = A.shape[1] % ROUND == B.shape[0] % ROUND == 0  # grouped products need it
        products, outer = (self._products, self._outer) if even else (OneByOne(), OneByOne())
        layer = _Layer(self, module, parts, A, B, products, outer, rows)
        anchor = self.anchor if {A.tensor, B.tensor} != {FIXED} else self.anchor.detach()
        added: Tensor = _Stacked.apply(output, x, anchor, layer)  # type: ignore[no-untyped-call]
        return added

    @torch.no_grad()
    def moved(self) -> None:
        """To be called when the factors have moved: forget the gradients, renew what products are made of."""
        self.forget()
        for name, parameter in self.values.items():
            if self._compute[name].dtype != parameter.dtype:  # else they are one tensor
                self._compute[name].copy_(parameter)

    def forget(self) -> None:
        """Forget the gradients."""
        for parameter in self.values.values():
            assert parameter.grad is not None
            parameter.grad.zero_()

    @torch.no_grad()
    def tensors(self, slot: int) -> dict[str, Tensor]:
        """A slot's trained factors as they are, copies on the CPU, under the names of `Adapter.tensors`."""
        rows = {name: found[slot].cpu() for name, found in self.values.items()}
        found = {}
        for module, pair in self._adapters[slot].pairs.items():
            for factor, tensor in pair.factors():
                name = f"{module}.{factor}"
                if (place := self._places[name]).tensor != FIXED:
                    whole = place.of(rows[place.tensor][None])[0]
                    found[name] = _cut(whole, tensor.shape).clone()
        return found


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's factors in the stacks, and how a batch's rows lie."""

    stacks: Stacks
    module: str
    parts: Parts
    A: _Place
    B: _Place
    products: Products
    outer: Products
    rows: tuple[RowGradients, Parts] | None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (slots, rank, d_in) and B (slots, d_out, rank), as products take them."""
        compute = self.stacks._compute
        return self.A.of(compute[self.A.tensor]), self.B.of(compute[self.B.tensor])

    def scale(self, dtype: torch.dtype) -> Tensor | float:
        """The scale of each row."""
        return self.parts.spread(self.stacks._scales[self.module], dtype)

    def collect(self, place: _Place, left: Tensor, right: Tensor) -> None:
        """Add a factor's gradient leftᵀ right to what there is: that of each slot, or of each row."""
        self.stacks.reached.add(self.module)
        if self.rows is not None:
            into, parts = self.rows
            place.of(into.of(place.tensor)).add_(self.outer.outer(left, right, parts))
            return
        whole = self.stacks.values[place.tensor].grad
        assert whole is not None
        place.of(whole).add_(self.outer.outer(left, right, self.parts))


class _Stacked(torch.autograd.Function):
    """output += scale · x Aᵀ Bᵀ for all slots; its backward adds the factors' gradients up in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, layer: _Layer) -> Tensor:
        A, B = layer.factors()
        flat = x.reshape(-1, x.shape[-1]).to(A.dtype)
        inner = layer.products.rows(flat, A.mT, layer.parts)
        inner = inner.mul_(layer.scale(A.dtype))
        output.view(-1, output.shape[-1]).add_(layer.products.rows(inner, B.mT, layer.parts))
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, inner)
        ctx.layer = layer
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, inner), layer = ctx.saved_tensors, ctx.layer
        (A, B), products, parts = layer.factors(), layer.products, layer.parts
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(A.dtype).contiguous()
        if layer.B.tensor != FIXED:
            layer.collect(layer.B, grad, inner)
        grad_x = None
        if layer.A.tensor != FIXED or ctx.needs_input_grad[1]:
            v = products.rows(grad, B, parts).mul_(layer.scale(A.dtype))
            if layer.A.tensor != FIXED:
                layer.collect(layer.A, v, x.reshape(-1, x.shape[-1]).to(A.dtype))
            if ctx.needs_input_grad[1]:
                grad_x = products.rows(v, A, parts).view(x.shape).to(x.dtype)
        return grads[0], grad_x, None, None


def _cut(padded: Tensor, shape: Sequence[int]) -> Tensor:
    """The factor within its padding."""
    return padded[: shape[0], : shape[1]]


def _layout(
    adapters: Sequence[Adapter], trained: Collection[str]
) -> tuple[dict[str, _Place], dict[str, int]]:
    """Where each factor lies, and how wide the tensors are."""
    places, widths = dict[str, _Place](), dict[str, int]()
    for module, pair in adapters[0].pairs.items():
        d_out, d_in = pair.shape
        widest = max(adapter.pairs[module].rank for adapter in adapters)
        rank = max(1, -(-widest // ROUND)) * ROUND
        for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            name = f"{module}.{factor}"
            tensor = factor if name in trained else FIXED
            start = widths.get(tensor, 0)
            places[name] = _Place(tensor, start, shape)
            widths[tensor] = start + -(-shape[0] * shape[1] // ROUND) * ROUND
    return places, widths


def _rows(adapter: Adapter, places: Mapping[str, _Place], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """A slot's row of each tensor, on the CPU."""
    rows: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        for factor, tensor in pair.factors():
            place = places[f"{module}.{factor}"]
            if place.tensor not in rows:
                rows[place.tensor] = torch.zeros(widths[place.tensor], dtype=tensor.dtype)
            _cut(place.of(rows[place.tensor][None])[0], tensor.shape).copy_(tensor)
    return rows
