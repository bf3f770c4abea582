"""K adapters on one frozen model: each row of a batch goes through the adapter of its client.

A batch holds its rows client by client. At every target layer each client's rows meet that client's own
factors, at that client's own rank, so that one pass over the shared base trains K clients and nothing is
padded. The base is never written to: low-rank and sparse terms are added by forward hooks, what a client's
base has folded in among them, and trained whole modules (the head) stand in for the base's while the bank is
open. An extra `MODULE.magnitude` makes that module one of DoRA.
"""

import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.core.sparse import SPARSE, spread
from fedlora.errors import ApartError, ModelError
from fedlora.models import adapter_parameters
from fedlora.models.base import Base
from fedlora.models.dora import MAGNITUDE, lengths, stretch
from fedlora.models.first_token import keep_first
from fedlora.models.lora import layer_shape
from fedlora.models.low_rank import add_low_rank
from fedlora.models.per_row import Copies, call_rows


class MultiAdapterModel:
    """K clients' adapters over one model, for use in a `with` block.

    Args:
        base: the frozen model; identical before, during and after.
        tasks: one a slot, of any ranks, scales and folds.
        train: whether gradients reach what the tasks train.
        per_row: whether each row gets its own gradient, by differentiating by `leaves`.
        every_token: whether a classifier's last layer is wanted of every token, whatever its head reads.

    Attributes:
        unpadded: whether batches are to be fed by `Base.losses_unpadded`.

    Raises:
        ModelError: an adapter names a module that the model lacks, or of another shape; or per row, there
            are sparse values or magnitudes, which have no such gradient.
    """

    def __init__(
        self,
        base: Base,
        tasks: Sequence[Task],
        train: bool = False,
        per_row: bool = False,
        every_token: bool = False,
    ) -> None:
        first = tasks[0].adapter
        for task in tasks:
            if (
                task.adapter.pairs.keys() != first.pairs.keys()
                or task.adapter.extra.keys() != first.extra.keys()
            ):
                raise ModelError("the adapters of one pass must have the same modules and the same heads")
        self._model, self._after = base.model, None if every_token else base.after
        self.unpadded = base.offset is not None and not per_row and not every_token
        self._batch = threading.local()  # batches may be on their way in several threads
        self._tasks = tasks
        each = [(task, frozenset(task.trained() if train else ())) for task in tasks]
        self._pairs = [adapter_parameters.leaves(base, task.adapter, trained) for task, trained in each]
        self._folds = adapter_parameters.folds(base, tasks)
        self._sparse = [adapter_parameters.values(base, task, trained) for task, trained in each]
        self._magnitudes = [adapter_parameters.magnitudes(base, t.adapter, trained) for t, trained in each]
        self._heads = [adapter_parameters.copies(base, task.adapter, trained) for task, trained in each]
        if per_row and (any(self._sparse) or any(self._magnitudes)):
            raise ModelError("sparse values and DoRA's magnitudes have no gradient for each row")
        alone = range(len(tasks)) if per_row else ()
        self._rows = Copies([[p for own in self.factors(slot).values() for p in own] for slot in alone])
        self._by_row = base.traits.by_row
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
        vocabulary = getattr(self._model, "get_output_embeddings", lambda: None)()
        if vocabulary is not None and any(modules[name] is vocabulary for name, _ in named):
            self.unpadded = False  # it is shown the tokens before a response's alone
        for name in dict.fromkeys([*(name for name, _ in named), *self._sparse[0], *self._magnitudes[0]]):
            self._handles.append(modules[name].register_forward_hook(self._hook(name), with_kwargs=True))
        if self._after is not None:
            self._handles.append(keep_first(self._after))
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

    def route(self, counts: Sequence[int], tokens: Sequence[int] | None = None) -> None:
        """Say what each slot has in this thread's next batch, which holds the slots one after the other.

        Args:
            counts: rows of each.
            tokens: tokens of each, where the rows lie end to end.
        """
        self._batch.rows = _segments(counts)
        self._batch.tokens = None if tokens is None else _segments(tokens)
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

    def parameters(self, slot: int) -> dict[str, nn.Parameter]:
        """One slot's parameters, trained or not, under the names of `Adapter.tensors`."""
        found = {f"{m}.{f}": p for m, factors in self._pairs[slot].items() for f, p in factors.items()}
        for name, head in self._heads[slot].items():
            found |= {f"{name}.{key}": p for key, p in head.named_parameters()}
        found |= {f"{m}{SPARSE}": p for m, (p, _, _) in self._sparse[slot].items()}
        return found | {f"{m}{MAGNITUDE}": p for m, p in self._magnitudes[slot].items()}

    def adapter(self, slot: int) -> Adapter:
        """A copy of one slot's adapter as it now is."""
        now = {name: p.detach().clone() for name, p in self.parameters(slot).items()}
        return self._tasks[slot].adapter.with_tensors(now)

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
            units = segments[-1][1]
            if pairs:
                live = [k for k, (start, stop) in enumerate(segments) if stop > start]
                found = [{f: self._rows.of(own) for f, own in pairs[k].items()} for k in live]
                factors = [f for p in found for f in (p["A"], p["B"] @ p["M"] if "M" in p else p["B"])]
                ends, s = [segments[k] for k in live], [scales[k] for k in live]
                output = add_low_rank(output, x, units, ends, s, factors)
            if folds:
                every = segments if len(folds) > 1 else [(0, units)]
                output = add_low_rank(
                    output, x, units, every, [p.scale for p in folds], [f for p in folds for f in (p.A, p.B)]
                )
            if sparse:
                flat = x.reshape(units, -1, x.shape[-1]).to(sparse[0][0])
                parts = zip(segments, sparse, strict=True)
                change = torch.cat([F.linear(flat[a:b], spread(*s)) for (a, b), s in parts])
                output = output + change.view(output.shape).to(output)
            if magnitudes:
                ratios = [
                    m if a == b else m / lengths(module, name, self._change(k, name))
                    for k, ((a, b), m) in enumerate(zip(segments, magnitudes, strict=True))
                ]
                flat = output.reshape(units, -1, output.shape[-1])
                output = stretch(flat, getattr(module, "bias", None), segments, ratios).view(output.shape)
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
        """The rows (start, stop) of each slot; or the tokens, where rows lie end to end."""
        tokens: list[tuple[int, int]] | None = getattr(self._batch, "tokens", None)
        if tokens is not None and x.ndim == 3 and x.shape[:2] == (1, tokens[-1][1]):
            return tokens
        if len(self._pairs) == 1 and not self._rows.on:
            return [(0, x.shape[0])]
        rows: list[tuple[int, int]] = self._batch.rows
        if x.shape[0] != rows[-1][1] or (self._by_row is not None and name not in self._by_row):
            told = (
                f"'{name}' is fed {tuple(x.shape)}, not one row for each of the {rows[-1][1]} rows of the "
                "batch, so that they cannot be told apart by "
            )
            if self._rows.on:
                raise ModelError(f"{told}record; leave it out of lora.targets, or use privacy=none")
            raise ApartError(f"{told}client; train this model with engine.fuse=1")
        return rows


def _segments(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of parts of these lengths, one after the other."""
    stops = list(itertools.accumulate(counts))
    return list(zip([0, *stops], stops, strict=False))
