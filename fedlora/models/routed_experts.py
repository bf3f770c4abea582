"""What the experts of a layer compute, each with the changes of the adapters: their module's forward."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.models.changes import Change
from fedlora.models.experts import Expert
from fedlora.models.products import Parts
from fedlora.models.routing import Routing

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"


def known(module: Any) -> bool:
    """Whether a module says of its experts what transformers' `use_experts_implementation` lets it say.

    Its experts then are two linear layers, with a gate or a plain activation between them.
    """
    told = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate", "num_experts")
    return all(hasattr(module, name) for name in told)


class RoutedExperts:
    """The forward of a module of experts: each token goes through those that its router has chosen for it.

    Tokens are sorted by expert. Within an expert they stay in their order, so that a slot's lie together, and
    both of its linear layers are changed as any other layer is, by the adapter of each slot.

    Args:
        module: of experts that are `known`.
        name: its name.
        changes: by layer, such as "mlp.experts.down_proj[3]".
        routing: whose tokens are whose.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        changes: Mapping[str, Change],
        routing: Routing,
    ) -> None:
        self._module, self._name = module, name
        self._changes, self._routing = changes, routing
        self._up = UP[0] if module.has_gate else UP[1]

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        """What the module returns.

        Args:
            given: hidden states (tokens, d), the experts of each token (tokens, k), and their weights.
            named: those of the three that came by name, in this order.
        """
        x, chosen, weights = (*given, *named.values())
        k, experts = chosen.shape[-1], self._module.num_experts
        segments = self._routing.segments(x, self._name, flat=True)
        each = len(x) // max(1, segments[-1][1])  # tokens of a row; 1 where the segments are of tokens
        # What has a gradient of its own: a slot, or each of its rows.
        units = [[each] * (b - a) if self._routing.alone else [(b - a) * each] for a, b in segments]
        lengths = torch.tensor([n for own in units for n in own])
        owner = torch.arange(len(lengths)).repeat_interleave(lengths * k).to(x.device)
        which = chosen.reshape(-1)
        cells = (which * len(lengths) + owner).bincount(minlength=experts * len(lengths))
        counts = cells[: experts * len(lengths)].view(experts, -1).tolist()
        order, weights = which.argsort(stable=True), weights.reshape(-1)
        output, at = torch.zeros_like(x), 0
        for expert, found in enumerate(counts):
            picked = order[at : at + sum(found)]
            at += len(picked)
            if len(picked):
                tokens, left = picked // k, iter(found)
                dealt = [[next(left) for _ in own] for own in units]
                made = self._expert(expert, x[tokens], dealt) * weights[picked, None]
                output.index_add_(0, tokens, made.to(output.dtype))
        return output

    def _expert(self, expert: int, x: Tensor, dealt: list[list[int]]) -> Tensor:
        """One expert's output of its tokens, of which each slot, or each of its rows, has so many."""
        module = self._module
        y = self._linear(self._up, expert, x, dealt)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._linear(DOWN, expert, y, dealt)
        return module.post_expert_norm(y) if module.has_post_expert_norm else y

    def _linear(self, parameter: str, expert: int, x: Tensor, dealt: list[list[int]]) -> Tensor:
        layer = Expert(self._module, parameter, expert)
        y = F.linear(x, layer.weight, layer.bias)
        change = self._changes.get(f"{self._name}.{parameter}[{expert}]")
        if change is None:
            return y
        parts = Parts([sum(own) for own in dealt], x.device)
        segments = list(zip([0, *parts.stops], parts.stops, strict=False))
        return change(x, y, segments, parts, dealt if self._routing.alone else None)
