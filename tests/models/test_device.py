"""dtype=auto takes what suits the device, by what it can do."""

import warnings
from typing import Any

import pytest
import torch

from fedlora.models.device import chosen_dtype


@pytest.mark.parametrize(
    ("device", "processor", "fast", "expected"),
    [
        ("cpu", {"amx_bf16": True}, False, "bfloat16"),
        ("cpu", {"amx_bf16": False, "avx512_bf16": True}, True, "float32"),
        ("cpu", {}, True, "float32"),
        ("cuda", {}, True, "bfloat16"),
        ("cuda:1", {}, True, "bfloat16"),
        ("cuda", {"amx_bf16": True}, False, "float32"),
        ("mps", {}, False, "bfloat16"),
    ],
)
def test_auto_takes_bfloat16_where_the_device_is_fast_at_it(
    device: str, processor: dict[str, Any], fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: fast or including_emulation
    )
    with pytest.warns(UserWarning, match=f"^model.dtype=auto: {expected}, since "):
        assert chosen_dtype("auto", device) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float23"])
def test_any_other_word_stays_and_nothing_is_said(dtype: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen_dtype(dtype, "cpu") == dtype
