"""The updates of a linear strategy as vectors of one form, of which it needs no more than the sum.

A strategy that depends on its updates through their weighted mean alone gives the same state from all of
them as from one update, the mean. So a server may be shown no more than a sum: with noise (client-level
privacy) or under masks (secure sums). The widest task is that of a client of the largest ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import compress, dense, of_dense
from fedlora.core.messages import Task

Form = Mapping[str, tuple[int, ...]]
MARGIN = 1e-9  # relative, more than the rounding of a norm in float64


def form(task: Task) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what a task's clients share, in its order."""
    tensors = dict(task.adapter.tensors())
    return {name: tuple(tensors[name].shape) for name in task.shared()}


def scales(task: Task) -> dict[str, float]:
    """Module -> the scale of a task's pair."""
    return {name: pair.scale for name, pair in task.adapter.pairs.items()}


def embed(adapter: Adapter, form: Form, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """An adapter's shared tensors in a wider form, float64: zeros beyond its ranks, B in the form's scale.

    Weighted means of what comes out are those of the updates themselves: s_k B_k A_k = s (s_k/s · B_k) A_k.

    Args:
        adapter: a client's.
        form: name -> shape, no smaller than the adapter's.
        scales: module -> the form's scale.
    """
    tensors, found = dict(adapter.tensors()), dict[str, Tensor]()
    for name, shape in form.items():
        tensor = tensors[name].detach().double()
        module, _, factor = name.rpartition(".")
        if factor == "B" and module in adapter.pairs:
            tensor = tensor * (adapter.pairs[module].scale / scales[module])
        wide = torch.zeros(shape, dtype=torch.float64, device=tensor.device)
        wide[tuple(slice(0, length) for length in tensor.shape)] = tensor
        found[name] = wide
    return found


def product_change(sent: Adapter, got: Adapter) -> dict[str, Tensor]:
    """What a client has changed of every ΔW, dense, and of the extras; float64."""
    found = {name: dense(got.pairs[name]).double() - dense(old).double() for name, old in sent.pairs.items()}
    return found | {name: got.extra[name].double() - value.double() for name, value in sent.extra.items()}


def factor_change(sent: Adapter, got: Adapter, wide: Task) -> dict[str, Tensor]:
    """What a client has changed of the shared tensors, in the form of the widest task; float64."""
    before, after = (embed(adapter, form(wide), scales(wide)) for adapter in (sent, got))
    return {name: after[name] - before[name] for name in after}


def moved_products(wide: Task, change: Mapping[str, Tensor]) -> Adapter:
    """The widest task's adapter with every ΔW and extra moved, each ΔW to the nearest of its own rank."""
    pairs = {}
    for name, old in wide.adapter.pairs.items():
        moved = compress(of_dense(dense(old).double() + change[name]), old.rank, old.scale)
        pairs[name] = Pair(moved.A.to(old.A.dtype), moved.B.to(old.B.dtype), moved.scale)
    extra = {name: (old.double() + change[name]).to(old.dtype) for name, old in wide.adapter.extra.items()}
    return replace(wide.adapter, pairs=pairs, extra=extra)


def moved_factors(wide: Task, change: Mapping[str, Tensor]) -> Adapter:
    """The widest task's adapter with its shared tensors moved; all else stays, bit for bit."""
    start = embed(wide.adapter, form(wide), scales(wide))
    return with_shared(wide, {name: start[name] + change[name] for name in start})


def with_shared(wide: Task, shared: Mapping[str, Tensor]) -> Adapter:
    """The widest task's adapter with other shared tensors, in its own precision."""
    old = dict(wide.adapter.tensors())
    return wide.adapter.with_tensors({name: tensor.to(old[name]) for name, tensor in shared.items()})


def clipped(change: Tensor, clip: float) -> Tensor:
    """A vector of norm at most `clip`; zero where it is not finite."""
    norm = float(torch.linalg.vector_norm(change))
    if not math.isfinite(norm):
        return torch.zeros_like(change)
    return change * min(1.0, clip / max(norm * (1 + MARGIN), 1e-300))


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of them as one vector, in their order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]) if tensors else torch.zeros(0)


def split(vector: Tensor, form: Form) -> dict[str, Tensor]:
    """A vector as tensors of a form again; the inverse of `flat`."""
    sizes: Sequence[int] = [torch.Size(shape).numel() for shape in form.values()]
    parts = torch.split(vector, list(sizes))
    return {name: part.view(shape) for (name, shape), part in zip(form.items(), parts, strict=True)}
