"""What the tasks of a bank bring with them, as the parameters of its slots."""

import copy
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.core.sparse import SPARSE, SparseMask, places
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.dora import MAGNITUDE, split
from fedlora.models.lora import layer_shape


def _leaf(tensor: Tensor, device: torch.device, trained: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=trained)


def leaves(base: Base, adapter: Adapter, trained: Collection[str]) -> dict[str, dict[str, nn.Parameter]]:
    """A parameter for every factor, those to train with a gradient."""
    return {
        name: {f: _leaf(tensor, base.device, f"{name}.{f}" in trained) for f, tensor in pair.factors()}
        for name, pair in adapter.pairs.items()
    }


def folds(base: Base, tasks: Sequence[Task]) -> dict[str, list[Pair]]:
    """Module -> what each slot's base has folded in; one pair for all where it is the same for all."""
    found = {}
    for name in {name: None for task in tasks for name in task.fold}:
        own = [task.fold[name].plain() if name in task.fold else None for task in tasks]
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


def values(
    base: Base, task: Task, trained: Collection[str]
) -> dict[str, tuple[nn.Parameter, Tensor, tuple[int, int]]]:
    """Module -> the values of its sparse update, their places, and the layer's shape."""
    mask = task.part(SparseMask)
    if mask is None:
        return {}
    found = {}
    for key, values in task.adapter.extra.items():
        if key.endswith(SPARSE):
            name = key.removesuffix(SPARSE)
            shape = layer_shape(base.model.get_submodule(name), name)
            indices = places(mask.seed, name, shape, len(values)).to(base.device)
            found[name] = (_leaf(values, base.device, key in trained), indices, shape)
    return found


def magnitudes(base: Base, adapter: Adapter, trained: Collection[str]) -> dict[str, nn.Parameter]:
    """Module -> the lengths of its weight's rows, by DoRA."""
    return {
        name: _leaf(value, base.device, name + MAGNITUDE in trained)
        for name, value in split(adapter)[0].items()
    }


def copies(base: Base, adapter: Adapter, trained: Collection[str]) -> dict[str, nn.Module]:
    """The adapter's own copy of every head of which it has tensors; the base's own serves for the others."""
    extra = {key: value for key, value in split(adapter)[1].items() if not key.endswith(SPARSE)}
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
