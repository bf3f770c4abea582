"""What the adapters of the slots make of a layer's output, each slot's rows by its own adapter."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.core.messages import Task
from fedlora.core.parametrization import LORA
from fedlora.models import adapter_parameters
from fedlora.models.base import Base
from fedlora.models.lora import layer_of
from fedlora.models.low_rank import add_low_rank
from fedlora.models.per_row import Copies
from fedlora.models.routing import Layout
from fedlora.models.stacks import Stacks

# Of a layer's input and output, and how their rows are dealt, the new output. The one that is given, which
# nothing else may hold, may be changed in place.
Adapted = Callable[[Tensor, Tensor, Layout], Tensor]


class AdaptedLayers:
    """What becomes of the output of every layer.

    Args:
        base: the frozen model.
        tasks: one a slot.
        factors: of each slot, module -> its factors.
        stacks: the factors of all slots, where they lie so; else None.
        rows: the rows' own copies of what is trained.
    """

    def __init__(
        self,
        base: Base,
        tasks: Sequence[Task],
        factors: Sequence[Mapping[str, Mapping[str, nn.Parameter]]],
        stacks: Stacks | None,
        rows: Copies,
    ) -> None:
        self._tasks, self._factors, self._stacks, self._rows = tasks, factors, stacks, rows
        self._forms = [task.adapter.parametrization for task in tasks]
        self._constants = [
            adapter_parameters.constants(base, form, own)
            for form, own in zip(self._forms, factors, strict=True)
        ]
        self._layers = {name: layer_of(base, name) for name in factors[0] if self._forms[0] != LORA}
        self._base_deltas = adapter_parameters.base_deltas(base, tasks)

    def of(self, name: str) -> Adapted:
        """What becomes of the output of one layer.

        Args:
            name: of the layer.
        """
        form, own = self._forms[0], name in self._factors[0]
        paired = own and name in self._tasks[0].adapter.pairs
        low_rank = own and (paired if form.pairs else form.has_low_rank)
        scales = [task.adapter.pairs[name].scale if paired else 1.0 for task in self._tasks]
        base_deltas = self._base_deltas.get(name, [])

        def adapted(x: Tensor, output: Tensor, layout: Layout) -> Tensor:
            segments, made = layout.segments, self._rows.gradients
            units = segments[-1][1]
            live = [k for k, (start, stop) in enumerate(segments) if stop > start]
            if own and self._stacks:
                rows = None if made is None else (made, layout.rows)
                output = self._stacks.add(output, x, name, layout.slots, rows)
            elif low_rank:
                factors = [f for k in live for f in self._low_rank(k, name)]
                ends, s = [segments[k] for k in live], [scales[k] for k in live]
                each = [layout.rows_of(k) for k in live] if self._rows.on else None
                output = add_low_rank(output, x, units, ends, s, factors, each)
            if base_deltas:
                every = segments if len(base_deltas) > 1 else [(0, units)]
                factors = [f for p in base_deltas for f in (p.A, p.B)]
                output = add_low_rank(output, x, units, every, [p.scale for p in base_deltas], factors)
            if own and form != LORA:
                output = self._beyond_low_rank(name, x, output, [(k, *segments[k]) for k in live], units)
            return output

        return adapted

    def _low_rank(self, slot: int, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one slot's term in a layer; per row, each row's own where they are trained."""
        own = self._factors[slot][name]
        form = self._forms[slot]
        if form == LORA:
            return self._rows.of(own["A"]), self._rows.of(own["B"])
        return form.low_rank(self._layers[name], self._all(slot, name))

    def _all(self, slot: int, name: str) -> dict[str, Tensor]:
        """A layer's factors, each row's own where there are such, and its constants."""
        own = {factor: self._rows.of(parameter) for factor, parameter in self._factors[slot][name].items()}
        return own | self._constants[slot][name]

    def _beyond_low_rank(
        self, name: str, x: Tensor, output: Tensor, live: list[tuple[int, int, int]], units: int
    ) -> Tensor:
        """The layer's output with each slot's dense change, and what the parametrization makes of it."""
        layer = self._layers[name]
        changes = [self._forms[k].dense(layer, self._all(k, name)) for k, _, _ in live]
        if changes and changes[0] is not None:
            flat = x.reshape(units, -1, x.shape[-1]).to(changes[0])
            parts = [
                F.linear(flat[a:b], c) for (_, a, b), c in zip(live, changes, strict=True) if c is not None
            ]
            output = output + torch.cat(parts).view(output.shape).to(output)
        if self._forms[0].changes_output:
            flat = output.reshape(units, -1, output.shape[-1])
            parts = [
                self._forms[k].output(layer, flat[a:b], self._all(k, name), partial(self._change, k, name))
                for k, a, b in live
            ]
            output = torch.cat(parts).view(output.shape)
        return output

    @torch.no_grad()
    def _change(self, slot: int, name: str) -> Tensor:
        """ΔW of one slot and module, (d_out, d_in), of all that there is; a constant to the gradient."""
        pairs, factors = self._tasks[slot].adapter.pairs, self._all(slot, name)
        scale = pairs[name].scale if name in pairs else 1.0
        found = self._forms[slot].change(self._layers[name], factors, scale)
        change = next(iter(factors.values())).new_zeros(()) if found is None else found
        if name in self._base_deltas:
            base_delta = self._base_deltas[name][slot if len(self._base_deltas[name]) > 1 else 0]
            change = change + base_delta.scale * base_delta.B @ base_delta.A
        return change
