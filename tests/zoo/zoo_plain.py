"""What plain transformers, PEFT and torch make of a model: one row after the other, without padding.

Every row goes through a fresh copy, since some models keep something of a row in their modules.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.data import Example


def plain(path: Path, kind: str, labels: int, dtype: torch.dtype) -> Any:
    """The model as a user of transformers loads it."""
    if kind == "instruction":
        return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype).eval()
    return AutoModelForSequenceClassification.from_pretrained(
        str(path), dtype=dtype, num_labels=labels
    ).eval()


def adapted(model: Any, folder: Path) -> Any:
    """The model with an adapter put in by PEFT, its factors and heads ready to be trained."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True).eval()


def logits(model: Any, row: Example) -> Tensor:
    """A classifier's logits of one row, (labels,); a decoder's, (tokens, vocabulary)."""
    ids = torch.tensor([row.input_ids])
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return found


def loss(model: Any, row: Example) -> Tensor:
    """The cross-entropy of a row's label, or the mean of that of its response's tokens."""
    found = logits(model, row)
    if isinstance(row.target, int):
        return F.cross_entropy(found[None], torch.tensor([row.target]))
    return F.cross_entropy(found[:-1], torch.tensor(row.target[1:]))


def trained(model: PeftModel) -> dict[str, nn.Parameter]:
    """What PEFT trains, by the names that fedlora gives it: MODULE.A, MODULE.B, and the heads' own."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
            for factor in "AB":
                name = name.replace(f".lora_{factor}.default.weight", f".{factor}")
            found[name] = parameter
    return found


def gradients(model: PeftModel, row: Example) -> dict[str, Tensor]:
    """The gradient of one row's loss by all that is trained."""
    model = copy.deepcopy(model)
    parameters = trained(model)
    found = torch.autograd.grad(loss(model, row), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def generated(model: PeftModel, prompt: list[int], most: int, ends: list[int], pad: int) -> list[int]:
    """What follows a prompt: the likeliest token each time, up to an end."""
    ids = torch.tensor([prompt])
    said = copy.deepcopy(model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        eos_token_id=ends,
        pad_token_id=pad,
        do_sample=False,
    )
    return [token for token in said[0, len(prompt) :].tolist() if token not in ends]
