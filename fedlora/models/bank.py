"""K adapters on one frozen model: each row of a batch goes through the adapter of its client.

A batch holds its rows client by client. At every target layer each client's rows meet that client's own
factors, at that client's own rank, so that one pass over the shared base trains K clients and nothing is
padded. The base is never written to: low-rank terms are added by forward hooks, and trained whole modules
(the head) stand in for the base's while the bank is open.
"""

import copy
import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedlora.adapter import Adapter, Pair
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.lora import layer_shape


class Bank:
    """K adapters over one model, for use in a `with` block.

    Args:
        base: the frozen model; identical before, during and after.
        adapters: one a slot, of any ranks and scales.
        train: the factors of each slot that receive gradients, and the heads with them; None for inference.

    Raises:
        ModelError: an adapter names a module that the model lacks, or of another shape.
    """

    def __init__(
        self, base: Base, adapters: Sequence[Adapter], train: Sequence[frozenset[str]] | None = None
    ) -> None:
        first = adapters[0]
        for adapter in adapters:
            if adapter.pairs.keys() != first.pairs.keys() or adapter.extra.keys() != first.extra.keys():
                raise ModelError("the adapters of one pass must have the same modules and the same heads")
        trained = [frozenset[str]()] * len(adapters) if train is None else train
        self._model = base.model
        self._batch = threading.local()  # batches may be on their way in several threads
        self._scales = {name: [a.pairs[name].scale for a in adapters] for name in adapters[0].pairs}
        self._pairs = [
            {
                name: (_leaf(pair.A, base.device, "A" in own), _leaf(pair.B, base.device, "B" in own))
                for name, pair in adapter.pairs.items()
            }
            for adapter, own in zip(adapters, trained, strict=True)
        ]
        self._heads = [_copies(base, adapter, train is not None) for adapter in adapters]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Self:
        modules = dict(self._model.named_modules())
        for name, (A, B) in (item for slot in self._pairs for item in slot.items()):
            if name not in modules:
                raise ModelError(f"the adapter has a pair for '{name}', a module that the model lacks")
            expected = layer_shape(modules[name], name)
            if (B.shape[0], A.shape[1]) != expected:
                raise ModelError(
                    f"the adapter's update of '{name}' is {(B.shape[0], A.shape[1])}, the layer {expected}"
                )
        for name in self._pairs[0]:
            self._handles.append(modules[name].register_forward_hook(self._hook(name), with_kwargs=True))
        for name in self._heads[0]:
            modules[name].forward = self._stand_in(name)
            self._replaced.append(modules[name])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles, self._replaced = [], []

    def route(self, counts: Sequence[int]) -> None:
        """Say how many rows each slot has in this thread's next batch, which holds them slot by slot."""
        stops = list(itertools.accumulate(counts))
        self._batch.segments = list(zip([0, *stops], stops, strict=False))

    def factors(self, slot: int) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters of one slot, grouped as "A", "B" and "head"; no empty group."""
        pairs = self._pairs[slot].values()
        groups = {
            "A": [A for A, _ in pairs],
            "B": [B for _, B in pairs],
            "head": [p for head in self._heads[slot].values() for p in head.parameters()],
        }
        trained = {name: [p for p in found if p.requires_grad] for name, found in groups.items()}
        return {name: found for name, found in trained.items() if found}

    def adapter(self, slot: int) -> Adapter:
        """A copy of one slot's adapter as it now is."""
        pairs = {
            name: Pair(A.detach().clone(), B.detach().clone(), self._scales[name][slot])
            for name, (A, B) in self._pairs[slot].items()
        }
        extra = {
            f"{name}.{key}": value.detach().clone()
            for name, head in self._heads[slot].items()
            for key, value in head.named_parameters()
        }
        return Adapter(pairs, extra)

    def _hook(self, name: str) -> Any:
        factors = [tensor for slot in self._pairs for tensor in slot[name]]
        scales = self._scales[name]

        def add(
            module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> Tensor:
            x = args[0] if args else next(iter(named.values()))
            segments = self._segments(x, name)
            added: Tensor = _LowRank.apply(output, x, segments, scales, *factors)  # type: ignore[no-untyped-call]
            return added

        return add

    def _stand_in(self, name: str) -> Any:
        heads = [slot[name] for slot in self._heads]
        dtype = next(heads[0].parameters()).dtype

        def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
            x = x.to(dtype)
            rows = [(k, *ends) for k, ends in enumerate(self._segments(x, name)) if ends[1] > ends[0]]
            return torch.cat([heads[k](x[start:stop], *rest, **named) for k, start, stop in rows])

        return forward

    def _segments(self, x: Tensor, name: str) -> list[tuple[int, int]]:
        """The rows (start, stop) of each slot."""
        if len(self._pairs) == 1:
            return [(0, x.shape[0])]
        segments: list[tuple[int, int]] = self._batch.segments
        if x.shape[0] != segments[-1][1]:
            raise ModelError(
                f"'{name}' is fed {x.shape[0]} rows where the batch has {segments[-1][1]}, so that they "
                "cannot be told apart by client; train this model with engine.fuse=1"
            )
        return segments


class _LowRank(torch.autograd.Function):
    """output += scale · x Aᵀ Bᵀ, each segment of rows through its own factors.

    In place on the layer's output, which nothing else holds. Several times faster than gathering factors for
    each row, and a smaller rank costs less instead of being padded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        segments: list[tuple[int, int]],
        scales: list[float],
        *factors: Tensor,
    ) -> Tensor:
        flat_x, flat_y = _flat(x, factors[0].dtype), output.view(-1, output.shape[-1])
        tokens = len(flat_x) // max(1, len(x))
        inner = []
        for k, (start, stop) in enumerate(segments):
            rows = slice(start * tokens, stop * tokens)
            u = (flat_x[rows] @ factors[2 * k].T).mul_(scales[k])
            flat_y[rows] += (u @ factors[2 * k + 1].T).to(output.dtype)
            inner.append(u)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, *inner, *factors)
        ctx.segments, ctx.scales, ctx.tokens = segments, scales, tokens
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        K, grad = len(ctx.segments), grads[0]
        x, inner = ctx.saved_tensors[0], ctx.saved_tensors[1 : K + 1]
        factors, wanted = ctx.saved_tensors[K + 1 :], ctx.needs_input_grad[4:]
        flat_x, flat_grad = _flat(x, factors[0].dtype), _flat(grad, factors[0].dtype)
        grad_x = torch.empty_like(flat_x) if ctx.needs_input_grad[1] else None
        grad_factors: list[Tensor | None] = [None] * len(factors)
        for k, (start, stop) in enumerate(ctx.segments):
            if start == stop:
                continue
            rows = slice(start * ctx.tokens, stop * ctx.tokens)
            g = flat_grad[rows]
            if wanted[2 * k + 1]:
                grad_factors[2 * k + 1] = g.T @ inner[k]
            if not (wanted[2 * k] or grad_x is not None):
                continue
            v = (g @ factors[2 * k + 1]).mul_(ctx.scales[k])
            if wanted[2 * k]:
                grad_factors[2 * k] = v.T @ flat_x[rows]
            if grad_x is not None:
                torch.mm(v, factors[2 * k], out=grad_x[rows])
        grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        return grad, grad_x, None, None, *grad_factors


def _leaf(tensor: Tensor, device: torch.device, trained: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=trained)


def _copies(base: Base, adapter: Adapter, trained: bool) -> dict[str, nn.Module]:
    """The adapter's own copy of every head of the base, or of none where the adapter has no extras."""
    copies = {}
    for name in base.heads if adapter.extra else ():
        twin = copy.deepcopy(base.model.get_submodule(name))
        for key, parameter in twin.named_parameters():
            given = adapter.extra.get(f"{name}.{key}")
            if given is None or given.shape != parameter.shape:
                raise ModelError(
                    f"the adapter's '{name}.{key}' is {None if given is None else tuple(given.shape)}, "
                    f"the model's {tuple(parameter.shape)}"
                )
            parameter.data = given.detach().to(parameter.device, copy=True)
            parameter.requires_grad_(trained)
        copies[name] = twin
    if unknown := [key for key in adapter.extra if not key.startswith(tuple(f"{h}." for h in base.heads))]:
        raise ModelError(f"the adapter has tensors that no head of the model owns: {unknown[:3]}")
    return copies


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
