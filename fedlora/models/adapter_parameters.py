"""What the tasks of a bank bring with them, as the parameters of its slots."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.core.parametrization import LORA, Parametrization
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.experts import layer_at
from fedlora.models.lora import layer_of, layer_shape
from fedlora.models.stacks import Stacks


def _leaf(tensor: Tensor, device: torch.device, trained: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=trained)


def adapted(model: nn.Module, tasks: Sequence[Task]) -> list[str]:
    """The layers that the tasks' pairs and base deltas change.

    Args:
        model: whose layers they are.
        tasks: one a slot.

    Raises:
        ModelError: the model has no such layer, or one of another shape.
    """
    named = [item for task in tasks for item in (*task.adapter.pairs.items(), *task.base_delta.items())]
    for name, pair in named:
        if pair.shape != (expected := layer_shape(layer_at(model, name), name)):
            raise ModelError(f"the adapter's update of '{name}' is {pair.shape}, the layer {expected}")
    return list(dict.fromkeys(name for name, _ in named))


def leaves(base: Base, adapter: Adapter, trained: Collection[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Module -> a parameter for each of its factors, those to train with a gradient."""
    return {
        module: {f: _leaf(tensor, base.device, f"{module}.{f}" in trained) for f, tensor in factors.items()}
        for module, factors in adapter.factors().items()
    }


def stacks(
    base: Base, tasks: Sequence[Task], trained: Collection[str], by_row: bool = False
) -> Stacks | None:
    """The tasks' factors in tensors of all, where the base computes so; None of another parametrization."""
    adapters = [task.adapter for task in tasks]
    if base.products is None or not adapters[0].pairs or any(a.parametrization != LORA for a in adapters):
        return None
    precise = next(iter(adapters[0].pairs.values())).A.dtype
    short = base.model.dtype in (torch.bfloat16, torch.float16)
    dtype = base.model.dtype if short else precise
    return Stacks(adapters, trained, base.device, dtype, base.products, by_row)


def constants(
    base: Base, form: Parametrization, factors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Module -> the tensors that a parametrization makes from its fields and the layer alone."""
    if form == LORA:
        return {}
    return {
        module: {
            name: tensor
            for name, tensor in form.with_constants(layer_of(base, module), own).items()
            if name not in own
        }
        for module, own in factors.items()
    }


def base_deltas(base: Base, tasks: Sequence[Task]) -> dict[str, list[Pair]]:
    """Module -> the base delta of each slot; one pair for all where it is the same for all."""
    found = {}
    for name in {name: None for task in tasks for name in task.base_delta}:
        own = [task.base_delta.get(name) for task in tasks]
        first = next(pair for pair in own if pair is not None)
        if all(pair is not None and _same(pair, first) for pair in own):
            own = [first]
        nothing = Pair(first.A[:0], first.B[:, :0], first.scale)
        found[name] = [
            Pair(pair.A.to(base.device), pair.B.to(base.device), pair.scale)
            for pair in (nothing if pair is None else pair for pair in own)
        ]
    return found


def _same(one: Pair, two: Pair) -> bool:
    if one is two:
        return True
    return one.scale == two.scale and torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def copies(base: Base, adapter: Adapter, trained: Collection[str]) -> dict[str, nn.Module]:
    """The adapter's own copy of every head of which it has tensors; the base's own serves for the others."""
    extra = adapter.heads()
    copies = {}
    for name in (n for n in base.heads if any(key.startswith(f"{n}.") for key in extra)):
        twin = copy.deepcopy(base.model.get_submodule(name))
        for key, parameter in twin.named_parameters():
            given = extra.get(f"{name}.{key}")
            if given is None or given.shape != parameter.shape:
                raise ModelError(
                    f"the adapter's '{name}.{key}' is {None if given is None else tuple(given.shape)}, "
                    f"the model's {tuple(parameter.shape)}"
                )
            parameter.data = given.detach().to(parameter.device, copy=True)
            parameter.requires_grad_(f"{name}.{key}" in trained)
        copies[name] = twin
    if unknown := _unknown(extra, base.heads):
        raise ModelError(f"the adapter has tensors that no head of the model owns: {unknown[:3]}")
    return copies


def _unknown(names: Iterable[str], heads: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(tuple(f"{head}." for head in heads))]
