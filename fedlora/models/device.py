"""The device that a base is on, and the precision of its frozen weights that suits it."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from fedlora.errors import ModelError

AUTO = "auto"


def check_device(device: str) -> None:
    """Raise ModelError unless torch can put tensors on a device of this name, here and now."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps"):
        raise ModelError(f"model.device: expected cpu, cuda, cuda:1 or mps, got '{device}'")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]
    try:
        if there:
            torch.empty(1, device=device)
    except RuntimeError as error:
        raise ModelError(
            f"model.device: torch cannot use '{device}' ({str(error).splitlines()[0]}); use model.device=cpu"
        ) from error
    if not there:
        raise ModelError(
            f"model.device: '{device}' was asked for, torch sees no GPU of that kind; use model.device=cpu"
        )


def chosen_dtype(dtype: str, device: str) -> str:
    """The dtype itself; of "auto" the one that suits the device, of which a warning tells.

    That is bfloat16 on a GPU, and on a CPU with AMX, which multiplies matrices of bfloat16 faster than of
    float32. By what the device can do and not by a measurement, which would come out otherwise now and then.

    Args:
        dtype: "auto", or one that stays as it is.
        device: as torch names it; one that torch does not know counts as a CPU.
    """
    if dtype != AUTO:
        return dtype
    found, why = _suited(device.partition(":")[0])
    warnings.warn(f"model.dtype=auto: {found}, since {why}", stacklevel=2)
    return found


def lacks_bfloat16() -> bool:
    """Whether this is known to be an x86 processor without instructions for it; older torch says nothing."""
    told = _processor()
    return told.get("architecture") == "x86_64" and not (told.get("amx_bf16") or told.get("avx512_bf16"))


def _suited(kind: str) -> tuple[str, str]:
    """The dtype that suits a kind of device, and why."""
    if (
        kind == "cuda"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "float32", "this GPU has no instructions for bfloat16"
    if kind in ("cuda", "mps"):
        return "bfloat16", "the model goes on a GPU"
    if _processor().get("amx_bf16"):
        return "bfloat16", "this processor has AMX"
    return "float32", "this processor has no AMX"


def _processor() -> Mapping[str, Any]:
    """What torch knows of the processor; nothing in a torch that does not say."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told
