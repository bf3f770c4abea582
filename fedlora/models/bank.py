"""K adapters on one frozen model: each row of a batch goes through the adapter of its client.

A batch holds its rows client by client. At every target layer each client's rows meet that client's own
factors, at that client's own rank, so that one pass over the shared base trains K clients and nothing is
padded. The base is never written to: low-rank and sparse terms are added by forward hooks, what a client's
base has folded in among them, and trained whole modules (the head) stand in for the base's while the bank is
open. An extra `MODULE.magnitude` makes that module one of DoRA.
"""

import copy
import itertools
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.adapter import Adapter, Pair
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.dora import MAGNITUDE, lengths, split, stretch
from fedlora.models.lora import layer_shape
from fedlora.models.low_rank import add_low_rank
from fedlora.models.per_row import Copies, call_rows
from fedlora.protocol import Task
from fedlora.sparse import SPARSE, places, spread


class Bank:
    """K clients' adapters over one model, for use in a `with` block.

    Args:
        base: the frozen model; identical before, during and after.
        tasks: one a slot, of any ranks, scales and folds.
        train: whether gradients reach what the tasks train.
        per_row: whether each row gets its own gradient, by differentiating by `leaves`.

    Raises:
        ModelError: an adapter names a module that the model lacks, or of another shape; or per row, there
            are sparse values or magnitudes, which have no such gradient.
    """

    def __init__(self, base: Base, tasks: Sequence[Task], train: bool = False, per_row: bool = False) -> None:
        first = tasks[0].adapter
        for task in tasks:
            if (
                task.adapter.pairs.keys() != first.pairs.keys()
                or task.adapter.extra.keys() != first.extra.keys()
            ):
                raise ModelError("the adapters of one pass must have the same modules and the same heads")
        self._model = base.model
        self._batch = threading.local()  # batches may be on their way in several threads
        self._tasks = tasks
        self._pairs = [_leaves(base, task, train) for task in tasks]
        self._folds = _folds(base, tasks)
        self._sparse = [_values(base, task, train) for task in tasks]
        self._magnitudes = [_magnitudes(base, task.adapter, train) for task in tasks]
        self._heads = [_copies(base, task.adapter, train) for task in tasks]
        if per_row and (any(self._sparse) or any(self._magnitudes)):
            raise ModelError("sparse values and DoRA's magnitudes have no gradient for each row")
        slots = range(len(tasks)) if per_row else ()
        self._rows = Copies([[p for own in self.factors(slot).values() for p in own] for slot in slots])
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Self:
        modules = dict(self._model.named_modules())
        named = [
            (name, pair)
            for task in self._tasks
            for name, pair in (*task.adapter.pairs.items(), *task.fold.items())
        ]
        for name, pair in named:
            if name not in modules:
                raise ModelError(f"the adapter has a pair for '{name}', a module that the model lacks")
            if pair.shape != (expected := layer_shape(modules[name], name)):
                raise ModelError(f"the adapter's update of '{name}' is {pair.shape}, the layer {expected}")
        for name in dict.fromkeys([*(name for name, _ in named), *self._sparse[0], *self._magnitudes[0]]):
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
        self._rows.make(counts)

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What this thread's batch is differentiated by: parameters, or per row their (rows, *shape)."""
        return [self._rows.of(parameter) for parameter in parameters]

    def factors(self, slot: int) -> dict[str, list[nn.Parameter]]:
        """One slot's trainable parameters, grouped as "A", "B", "M", "sparse", "magnitude" and "head"."""
        pairs = self._pairs[slot].values()
        groups = {factor: [pair[factor] for pair in pairs if factor in pair] for factor in "ABM"}
        groups["sparse"] = [values for values, _, _ in self._sparse[slot].values()]
        groups["magnitude"] = list(self._magnitudes[slot].values())
        groups["head"] = [p for head in self._heads[slot].values() for p in head.parameters()]
        trained = {name: [p for p in found if p.requires_grad] for name, found in groups.items()}
        return {name: found for name, found in trained.items() if found}

    def adapter(self, slot: int) -> Adapter:
        """A copy of one slot's adapter as it now is."""
        pairs = {
            name: Pair(
                scale=pair.scale, **{f: p.detach().clone() for f, p in self._pairs[slot][name].items()}
            )
            for name, pair in self._tasks[slot].adapter.pairs.items()
        }
        extra = {
            f"{name}.{key}": value.detach().clone()
            for name, head in self._heads[slot].items()
            for key, value in head.named_parameters()
        }
        sparse = {f"{m}{SPARSE}": v.detach().clone() for m, (v, _, _) in self._sparse[slot].items()}
        lengths = {f"{m}{MAGNITUDE}": v.detach().clone() for m, v in self._magnitudes[slot].items()}
        return Adapter(pairs, extra | sparse | lengths)

    def _hook(self, name: str) -> Any:
        pairs = [slot[name] for slot in self._pairs if name in slot]
        scales = [task.adapter.pairs[name].scale for task in self._tasks] if pairs else []
        folds = self._folds.get(name, [])
        sparse = [slot[name] for slot in self._sparse if name in slot]
        magnitudes = [slot[name] for slot in self._magnitudes if name in slot]

        def add(
            module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> Tensor:
            x = args[0] if args else next(iter(named.values()))
            segments = self._segments(x, name)
            if pairs:
                found = [{f: self._rows.of(own) for f, own in p.items()} for p in pairs]
                factors = [f for p in found for f in (p["A"], p["B"] @ p["M"] if "M" in p else p["B"])]
                output = add_low_rank(output, x, segments, scales, factors)
            if folds:
                every = segments if len(folds) > 1 else [(0, len(x))]
                output = add_low_rank(
                    output, x, every, [p.scale for p in folds], [f for p in folds for f in (p.A, p.B)]
                )
            if sparse:
                change = [
                    F.linear(x[a:b].to(s[0]), spread(*s)) for (a, b), s in zip(segments, sparse, strict=True)
                ]
                output = output + torch.cat(change).to(output)
            if magnitudes:
                ratios = [
                    m if a == b else m / lengths(module, name, self._change(k, name))
                    for k, ((a, b), m) in enumerate(zip(segments, magnitudes, strict=True))
                ]
                output = stretch(output, getattr(module, "bias", None), segments, ratios)
            return output

        return add

    @torch.no_grad()
    def _change(self, slot: int, name: str) -> Tensor:
        """ΔW of one slot and module, (d_out, d_in), of all that there is; a constant to the gradient."""
        change = self._magnitudes[slot][name].new_zeros(())
        if name in self._pairs[slot]:
            p, scale = self._pairs[slot][name], self._tasks[slot].adapter.pairs[name].scale
            change = change + scale * (p["B"] @ p["M"] if "M" in p else p["B"]) @ p["A"]
        if name in self._folds:
            fold = self._folds[name][slot if len(self._folds[name]) > 1 else 0]
            change = change + fold.scale * fold.B @ fold.A
        if name in self._sparse[slot]:
            change = change + spread(*self._sparse[slot][name])
        return change

    def _stand_in(self, name: str) -> Any:
        heads = [slot[name] for slot in self._heads]
        dtype = next(heads[0].parameters()).dtype
        parameters = [dict(head.named_parameters()) for head in heads]  # call_rows lends the module others

        def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
            x = x.to(dtype)
            rows = [(k, *ends) for k, ends in enumerate(self._segments(x, name)) if ends[1] > ends[0]]
            if self._rows.on:
                own = {
                    key: torch.cat([self._rows.of(parameters[k][key]) for k, _, _ in rows])
                    for key in parameters[0]
                }
                return call_rows(heads[0], own, x, rest, named)
            return torch.cat([heads[k](x[start:stop], *rest, **named) for k, start, stop in rows])

        return forward

    def _segments(self, x: Tensor, name: str) -> list[tuple[int, int]]:
        """The rows (start, stop) of each slot."""
        if len(self._pairs) == 1 and not self._rows.on:
            return [(0, x.shape[0])]
        segments: list[tuple[int, int]] = self._batch.segments
        if x.shape[0] != segments[-1][1]:
            what = "client; train this model with engine.fuse=1"
            if self._rows.on:
                what = "record; leave it out of lora.targets, or use privacy=none"
            raise ModelError(
                f"'{name}' is fed {x.shape[0]} rows where the batch has {segments[-1][1]}, so that they "
                f"cannot be told apart by {what}"
            )
        return segments


def _leaf(tensor: Tensor, device: torch.device, trained: bool) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, copy=True), requires_grad=trained)


def _leaves(base: Base, task: Task, train: bool) -> dict[str, dict[str, nn.Parameter]]:
    """A parameter for every factor, those to train with a gradient."""
    return {
        name: {
            factor: _leaf(tensor, base.device, train and factor in task.train and task.trains(name))
            for factor, tensor in pair.factors()
        }
        for name, pair in task.adapter.pairs.items()
    }


def _folds(base: Base, tasks: Sequence[Task]) -> dict[str, list[Pair]]:
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


def _values(base: Base, task: Task, train: bool) -> dict[str, tuple[nn.Parameter, Tensor, tuple[int, int]]]:
    """Module -> the values of its sparse update, their places, and the layer's shape."""
    if task.mask is None:
        return {}
    found = {}
    for key, values in task.adapter.extra.items():
        if key.endswith(SPARSE):
            name = key.removesuffix(SPARSE)
            shape = layer_shape(base.model.get_submodule(name), name)
            indices = places(task.mask, name, shape, len(values)).to(base.device)
            found[name] = (_leaf(values, base.device, train), indices, shape)
    return found


def _magnitudes(base: Base, adapter: Adapter, trained: bool) -> dict[str, nn.Parameter]:
    """Module -> the lengths of its weight's rows, by DoRA."""
    return {name: _leaf(value, base.device, trained) for name, value in split(adapter)[0].items()}


def _copies(base: Base, adapter: Adapter, trained: bool) -> dict[str, nn.Module]:
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
            parameter.requires_grad_(trained)
        copies[name] = twin
    if unknown := _unknown(extra, base.heads):
        raise ModelError(f"the adapter has tensors that no head of the model owns: {unknown[:3]}")
    return copies


def _unknown(names: Iterable[str], heads: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(tuple(f"{head}." for head in heads))]
