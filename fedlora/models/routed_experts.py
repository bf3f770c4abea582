"""What the experts of a layer compute, each with the changes of the adapters: their module's forward."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.models.adapted_layers import Adapted
from fedlora.models.experts import Expert
from fedlora.models.routing import Layout, Routing

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
        adapted: what becomes of the output of a layer such as "mlp.experts.down_proj[3]".
        routing: whose tokens are whose.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        adapted: Mapping[str, Adapted],
        routing: Routing,
    ) -> None:
        self._module, self._name = module, name
        self._adapted, self._routing = adapted, routing
        self._up = UP[0] if module.has_gate else UP[1]

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        """What the module returns.

        Args:
            given: hidden states (tokens, d), the experts of each token (tokens, k), and their weights.
            named: those of the three that came by name, in this order.
        """
        x, chosen, weights = (*given, *named.values())
        k, experts = chosen.shape[-1], self._module.num_experts
        sizes = self._routing.layout(x, self._name).sizes
        lengths = torch.tensor([size for own in sizes for size in own])
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
                dealt = [[next(left) for _ in own] for own in sizes]
                made = self._expert(expert, x[tokens], Layout(dealt, x.device)) * weights[picked, None]
                output.index_add_(0, tokens, made.to(output.dtype))
        return output

    def _expert(self, expert: int, x: Tensor, layout: Layout) -> Tensor:
        """One expert's output of its tokens."""
        module = self._module
        y = self._linear(self._up, expert, x, layout)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._linear(DOWN, expert, y, layout)
        return module.post_expert_norm(y) if module.has_post_expert_norm else y

    def _linear(self, parameter: str, expert: int, x: Tensor, layout: Layout) -> Tensor:
        layer = Expert(self._module, parameter, expert)
        y = F.linear(x, layer.weight, layer.bias)
        adapted = self._adapted.get(f"{self._name}.{parameter}[{expert}]")
        return y if adapted is None else adapted(x, y, layout)
