"""A quantised base: what transformers is asked for on a GPU, and what is refused without."""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.errors import ModelError
from fedlora.models import load
from fedlora.models.quantized import kept_whole, quantized


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if bitsandbytes were there; nothing is loaded with it."""
    there = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)


def test_without_it_nothing_is_asked_for(zoo: Any) -> None:
    assert quantized(None, None, "", "float32", "cpu") == {}


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_without_a_gpu_or_bitsandbytes_it_is_refused_in_one_line(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = zoo.folder("bert")
    with pytest.raises(ModelError, match=rf"^model\.quantize={how} needs a GPU, got model\.device=cpu"):
        load(folder, "classification", zoo.labels, quantize=how)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=rf"^model\.quantize={how} needs bitsandbytes: pip install"):
        quantized(how, AutoModelForSequenceClassification, str(folder), "bfloat16", "cuda")


def test_other_numbers_of_bits_are_refused(zoo: Any) -> None:
    with pytest.raises(ModelError, match=r"^model\.quantize: expected null, 4bit or 8bit, got '3bit'"):
        load(zoo.folder("bert"), "classification", zoo.labels, quantize="3bit")


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_transformers_is_asked_for_the_bits_and_to_spare_the_heads(zoo: Any, gpu: None, how: str) -> None:
    path = str(zoo.folder("distilbert"))
    asked = quantized(how, AutoModelForSequenceClassification, path, "bfloat16", "cuda:1")
    bits = asked["quantization_config"]
    assert asked["device_map"] == {"": "cuda:1"}
    assert (bits.load_in_4bit, bits.load_in_8bit) == (how == "4bit", how == "8bit")
    assert (bits.bnb_4bit_quant_type, bits.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert {"classifier", "pre_classifier"} <= set(bits.llm_int8_skip_modules)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_every_head_and_the_output_stay_whole(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    auto = AutoModelForCausalLM if name == "llama" else AutoModelForSequenceClassification
    kept = kept_whole(auto, str(zoo.folder(name)))
    assert {head.rpartition(".")[2] for head in base.heads} <= {*kept, "dense"}
    assert "lm_head" in kept
    assert base.model.base_model_prefix not in kept
