"""Attention in float32 of a model in bfloat16, on the CPU.

There torch's fused attention goes forward in bfloat16 about as fast as in float32, and backward ten times
slower. Attention is a small part of a model's arithmetic, so it pays to widen what goes into it.
"""

from typing import Any

import torch
from torch import Tensor

WIDE = "sdpa_in_float32"


def widen(model: Any) -> None:
    """Let a model attend in float32 where its own dtype would make training slow, and torch's way is used.

    Args:
        model: a transformers model on its device.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    slow = model.dtype == torch.bfloat16 and model.device.type == "cpu"
    if slow and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(WIDE, _attend)
        AttentionMaskInterface.register(WIDE, sdpa_mask)
        model.set_attn_implementation(WIDE)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    found, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **named)
    return found.to(query.dtype), None
