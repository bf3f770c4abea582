"""A classifier's last layer, computed for the one token that the head reads.

Encoders such as BERT and RoBERTa classify by the first token of their last layer. Every token's keys and
values count there, but of what follows the attention only the first token's; the rest, three quarters of the
layer, is work that nobody reads. Leaving it out changes no logit and no gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models.attention import packed

PLACE = "encoder.layer"  # where BERT and its like keep their layers
AFTER = (
    "attention.output"  # of a layer: what follows its attention, called with its states and the layer's input
)


@torch.no_grad()
def only_first_token(model: Any) -> nn.Module | None:
    """The module from which on the first token is enough, or None where that is not so or not known.

    It is tried, not believed: on two rows of other lengths the logits must stay what they are.
    """
    try:
        module: nn.Module = model.base_model.get_submodule(PLACE)[-1].get_submodule(AFTER)
    except (AttributeError, IndexError, TypeError):
        return None
    device = next(model.parameters()).device
    ids = torch.arange(10, device=device).view(2, 5) % int(model.config.get_text_config().vocab_size)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
    whole = model(input_ids=ids, attention_mask=mask).logits
    handle = keep_first(module)
    try:
        part = model(input_ids=ids, attention_mask=mask).logits
    except (RuntimeError, IndexError, ValueError):  # its head wants all tokens
        return None
    finally:
        handle.remove()
    told = part.shape == whole.shape and not torch.equal(whole[0], whole[1])  # a head of zeros tells nothing
    return module if told and near(part, whole) else None


def keep_first(module: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """From this module on, every row has its first token alone; until the handle is removed."""
    return module.register_forward_pre_hook(_first)


def near(found: Tensor, whole: Tensor) -> bool:
    """Whether logits are the same up to rounding in the model's dtype."""
    wide = 0.03 if found.dtype == torch.bfloat16 else 1e-3
    return bool((found - whole).abs().max() <= wide * whole.abs().max())


def _first(module: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if (pack := packed()) is not None:
        return tuple(x[0, pack.starts, None] for x in states)
    return tuple(x[:, :1] for x in states)
