"""A base in 4 or 8 bits, by transformers and bitsandbytes, on a GPU."""

import importlib.util
from typing import Any

import torch

from fedlora.errors import ModelError

BITS = ("4bit", "8bit")


def quantized(how: str | None, auto: Any, path: str, dtype: str, device: str) -> dict[str, Any]:
    """What `from_pretrained` is to be told: nothing without `how`, else the bits, and what stays whole.

    4 bits are NF4 with double quantisation, as in QLoRA (Dettmers et al., NeurIPS 2023, arXiv:2305.14314).

    Args:
        how: None, "4bit" or "8bit".
        auto: the transformers class that loads the model.
        path: the model's folder or name.
        dtype: of what is computed.
        device: where the model goes.

    Raises:
        ModelError: no such number of bits, no GPU, or no bitsandbytes.
    """
    if how is None:
        return {}
    if how not in BITS:
        raise ModelError(f"model.quantize: expected null, {' or '.join(BITS)}, got '{how}'")
    if not device.startswith("cuda"):
        raise ModelError(
            f"model.quantize={how} needs a GPU, got model.device={device}; use model.device=cuda"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantize={how} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=how == "4bit",
        load_in_8bit=how == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=kept_whole(auto, path),
    )
    return {"quantization_config": bits, "device_map": {"": device}}


def kept_whole(auto: Any, path: str) -> list[str]:
    """The modules that must not be quantised: the output layer, and heads, which are trained whole."""
    from transformers import AutoConfig

    with torch.device("meta"):  # names alone, no weights
        model = auto.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return sorted({*heads, "pooler", "lm_head"})  # a pooler is made up where the checkpoint has none
