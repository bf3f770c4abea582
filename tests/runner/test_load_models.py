"""The user is told where bfloat16 costs time instead of saving it."""

import warnings
from typing import Any

import pytest
import torch

from fedlora.config.composition import compose
from fedlora.config.translate import model_spec
from fedlora.data import Dataset
from fedlora.runner.load_models import load_base
from fedlora.tasks import Classification


@pytest.mark.parametrize(
    ("dtype", "processor", "slow"),
    [
        ("bfloat16", {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}, True),
        ("bfloat16", {"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": False}, False),
        ("bfloat16", {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}, False),
        ("bfloat16", {"architecture": "aarch64"}, False),
        ("bfloat16", {}, False),
        ("float32", {"architecture": "x86_64"}, False),
    ],
)
def test_bfloat16_on_a_processor_without_it_is_a_warning(
    dtype: str, processor: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    config = compose(["model=tiny", "data=tiny", f"model.dtype={dtype}"])
    dataset = Dataset("none", Classification(), (), (), ("a", "b"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        load_base(model_spec(config), dataset, 0, lambda *named: "loaded")  # type: ignore[arg-type, return-value]
    assert [str(warning.message).split(":")[0] for warning in warned] == ["model.dtype=bfloat16"] * slow
