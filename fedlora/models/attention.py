"""How a model attends: as transformers has it, and over rows that lie end to end as their pack says.

On a CPU a model in bfloat16 attends in float32, since torch's fused attention goes backward ten times slower
there in bfloat16 than in float32.
"""

import functools
import inspect
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedlora.models.pack import Pack

OURS = "fedlora"
# A comparison with "sdpa", alone or as one of several names.
COMPARED = re.compile(r"""(==|!=|\bin)\s*[(\[{]?[^\n:]*["']sdpa["']|["']sdpa["']\s*(==|!=|in\b)""")
_here = threading.local()


@contextmanager
def end_to_end(pack: Pack | None) -> Iterator[None]:
    """Within it, models of this thread are fed rows that lie as this pack says; None for padded ones."""
    before, _here.pack = packed(), pack
    try:
        yield
    finally:
        _here.pack = before


def packed() -> Pack | None:
    """The pack that this thread's models are fed, if they are."""
    return getattr(_here, "pack", None)


def takes_our_attention(model: Any) -> bool:
    """Whether a model of transformers may attend as this module says, by its device and its code.

    It must attend by torch's function ("sdpa"), on a CPU or an NVIDIA GPU, and its code must not ask for that
    name: a model that does (DeepSeek-V3.2, whose sparse mask is for "eager" and "sdpa") would become another.

    Args:
        model: on its device.
    """
    if model.device.type not in ("cpu", "cuda") or model.config._attn_implementation != "sdpa":
        return False
    return not any(_asks_for_sdpa(name) for name in {type(module).__module__ for module in model.modules()})


def attend_our_way(model: Any) -> bool:
    """Let a model of transformers attend as this module says; False where it cannot, or need not.

    Args:
        model: on its device.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if not takes_our_attention(model):
        return False
    AttentionInterface.register(OURS, _attend)
    AttentionMaskInterface.register(OURS, _mask)
    model.set_attn_implementation(OURS)
    return bool(model.config._attn_implementation == OURS)


def attend_plainly(model: Any) -> None:
    """Undo `attend_our_way`."""
    model.set_attn_implementation("sdpa")


@functools.cache
def _asks_for_sdpa(module: str) -> bool:
    """Whether the code of a module compares something with "sdpa"; True where there is no code to read."""
    if module.startswith("torch."):
        return False
    try:
        return COMPARED.search(inspect.getsource(sys.modules[module])) is not None
    except (OSError, TypeError):
        return True


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    pack, dtype = packed(), query.dtype
    parts = (query, key, value)
    if dtype == torch.bfloat16 and query.device.type == "cpu":
        parts = tuple(x.float() for x in parts)  # type: ignore[assignment]
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        bias = {name: x.float() for name, x in named.items() if isinstance(x, Tensor) and x.dtype == dtype}
        named |= bias
    if pack is None:
        found: Tensor = sdpa_attention_forward(module, *parts, mask, **named)[0]
        return found.to(dtype), None
    causal = named.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    return pack.attend(module, *parts, causal, named).to(dtype), None


def _mask(*args: Any, **named: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = None if packed() is not None else sdpa_mask(*args, **named)
    return made
