"""DoRA: the length of every row of a weight is trained by itself, LoRA moves the directions.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen. "DoRA: Weight-Decomposed Low-Rank Adaptation". ICML 2024.
https://arxiv.org/abs/2402.09353

    W' = m ⊙ V / ‖V‖_row,    V = W_0 + ΔW,    m = ‖V‖_row at the start

An adapter with an extra `MODULE.magnitude`, (d_out,), works so in that module. ΔW is all that is added to the
weight there: pair, fold and sparse values. As in §4.3 of the paper ‖V‖ is a constant to the gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.models.base import Base
from fedlora.models.lora import layer_weight

MAGNITUDE = ".magnitude"


def split(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Module -> its magnitudes; and the extras that are none."""
    found = {name: value for name, value in adapter.extra.items() if name.endswith(MAGNITUDE)}
    rest = {name: value for name, value in adapter.extra.items() if name not in found}
    return {name.removesuffix(MAGNITUDE): value for name, value in found.items()}, rest


def with_magnitudes(base: Base, adapter: Adapter, fold: Mapping[str, Pair] | None = None) -> Adapter:
    """The adapter with magnitudes for every pair that has none: those with which nothing changes.

    Args:
        base: the model.
        adapter: of any pairs.
        fold: what is added to the base besides.

    Raises:
        ModelError: a quantised weight.
    """
    made = {}
    for name, pair in adapter.pairs.items():
        change = dense(pair) + (dense(fold[name]) if fold and name in fold else 0)
        made[name + MAGNITUDE] = lengths(base.model.get_submodule(name), name, change)
    return Adapter(adapter.pairs, {**made, **adapter.extra})


def lengths(module: nn.Module, name: str, change: Tensor) -> Tensor:
    """‖W_0 + ΔW‖_row, (d_out,), above zero, in the dtype of ΔW.

    Raises:
        ModelError: a quantised weight.
    """
    V = layer_weight(module, name).to(change) + change
    norms: Tensor = torch.linalg.vector_norm(V, dim=1)
    return norms.clamp_min(torch.finfo(V.dtype).tiny)


def stretch(
    output: Tensor, bias: Tensor | None, segments: Sequence[tuple[int, int]], ratios: Sequence[Tensor]
) -> Tensor:
    """The layer's output with stretched rows, ratio ⊙ V x + bias, from V x + bias.

    Args:
        output: (rows, ..., d_out), the layer's output with all that is added to it.
        bias: the layer's.
        segments: first and last row of each slot.
        ratios: m / ‖V‖ of each slot, (d_out,).
    """
    plain = output if bias is None else output - bias
    parts = [plain[start:stop] * ratio for (start, stop), ratio in zip(segments, ratios, strict=True)]
    stretched = torch.cat(parts)
    return (stretched if bias is None else stretched + bias).to(output.dtype)
