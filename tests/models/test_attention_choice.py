"""The attention that a user asks for by transformers' name."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlora.errors import ModelError
from fedlora.models import load, load_given
from fedlora.models.attention import OURS
from fedlora.models.packaged import tiny
from fedlora.tasks import Classification

LABELS = ("yes", "no")


def loaded(**how: Any) -> Any:
    return load(tiny(), Classification(), LABELS, **how)


def logits(base: Any) -> torch.Tensor:
    ids = torch.arange(3, 15).view(2, 6)
    found: torch.Tensor = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def test_another_attention_is_the_models_and_rows_are_padded() -> None:
    with pytest.warns(UserWarning, match=r"^model\.attention=eager: .*padded, not packed"):
        base = loaded(attention="eager")
    assert base.model.config._attn_implementation == "eager"
    assert base.packing is None
    torch.testing.assert_close(logits(base), logits(loaded()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [None, "sdpa"])
def test_torchs_attention_is_ours_over_packed_rows_and_nothing_is_said(name: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = loaded(attention=name)
    assert base.model.config._attn_implementation == OURS
    assert base.packing is not None


@pytest.mark.parametrize("name", ["nonsense", "someone/kernel", "paged|eager", OURS, ""])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.attention: expected null, eager, .*sdpa, got"):
        loaded(attention=name)


def test_an_attention_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.attention=flash_attention_2: its package is not installed"):
        loaded(attention="flash_attention_2")


def test_an_attention_that_has_no_gradient_here_is_refused() -> None:
    def forward_only(module: Any, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> Any:
        if query.requires_grad:
            raise NotImplementedError("no way back\nwith details")
        return value.transpose(1, 2), None

    transformers.AttentionInterface.register("forward_only", forward_only)
    with pytest.raises(ModelError) as caught:
        loaded(attention="forward_only")
    said = str(caught.value)
    assert said.startswith("model.attention=forward_only: ")
    assert said.endswith("cannot be trained with it on cpu in float32: no way back")


def test_a_model_in_memory_takes_it_too() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    with pytest.warns(UserWarning, match=r"^model\.attention=eager"):
        base = load_given(model, tokenizer, Classification(), LABELS, attention="eager")
    assert base.model is model
    assert base.packing is None
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"model\.attention: expected null"):
        load_given(model, tokenizer, Classification(), LABELS, attention="nonsense")
