"""How a model attends: as transformers has it, and over rows that lie end to end as their pack says.

On a CPU a model in bfloat16 attends in float32, since torch's fused attention goes backward ten times slower
there in bfloat16 than in float32.
"""

import functools
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.models.pack import Pack
from fedlora.models.trial import Trial

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


def check_attention(name: str | None) -> None:
    """Refuse the name of an attention that transformers does not have, or cannot use on this machine.

    Names of kernels on the hub are refused too: they are code, and a run's settings may come from anyone.

    Args:
        name: as transformers' `attn_implementation` takes it; None for what it takes itself.

    Raises:
        ModelError: says which names there are, or what is missing.
    """
    if name is None:
        return
    import transformers

    known = {"eager", *transformers.AttentionInterface().valid_keys()} - {OURS}
    known = {key for key in known if not key.startswith("paged|")}  # needs the cache of a server
    if name not in known:
        raise ModelError(f"model.attention: expected null, {', '.join(sorted(known))}, got '{name}'")
    usable = getattr(transformers.utils, f"is_{name.replace('attention', 'attn')}_available", lambda: True)
    if not usable():
        raise ModelError(
            f"model.attention={name}: its package is not installed, or finds no GPU that it knows; install "
            "it, or use model.attention=null"
        )


def check_attends(trial: Trial, name: str, path: str) -> None:
    """Try a model with the attention that was asked for, which is not ours, and say what comes of that.

    Args:
        trial: of the model.
        name: of the attention.
        path: where the model came from.

    Raises:
        ModelError: the model cannot be trained with it.
    """
    try:
        trial.answers()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        where = f"{trial.model.device} in {str(trial.model.dtype).removeprefix('torch.')}"
        raise ModelError(
            f"model.attention={name}: '{path}' cannot be trained with it on {where}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    warnings.warn(
        f"model.attention={name}: '{path}' attends as transformers makes it, its rows padded, not packed",
        stacklevel=4,
    )


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
