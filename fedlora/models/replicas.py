"""A base on one more device of the same machine."""

import copy

from fedlora.errors import ModelError
from fedlora.models.attention import OURS, attend_plainly
from fedlora.models.base import Base
from fedlora.models.loading import tried


def replica(base: Base, device: str) -> Base:
    """The same model on another device, tried there as the first one was.

    Args:
        base: the model.
        device: where the copy goes, such as "cuda:1"; the model's own device gives a second copy there.

    Raises:
        ModelError: the model is quantised, and so cannot be moved.
    """
    if getattr(base.model, "is_quantized", False):
        raise ModelError(
            f"engine.devices: '{base.path}' is quantised, and such a model cannot be copied to {device}; use "
            "one device, or model.quantize=null"
        )
    model = copy.deepcopy(base.model)
    if model.config._attn_implementation == OURS:
        attend_plainly(model)
    plain = Base(model.to(device), base.tokenizer, base.task, base.heads, base.path)
    return tried(plain, base.memory.checkpointing or None, None)
