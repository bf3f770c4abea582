"""Models of a few thousand random numbers, of several families, as bases that are fed rows end to end."""

from typing import Any

import torch
import transformers

from fedlora.models import Base
from fedlora.models.attention import attend_our_way
from fedlora.models.first_token import only_first_token
from fedlora.models.packing import packing_of
from fedlora.tasks import Classification, Instruction

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_labels": 3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
ENCODERS: dict[str, dict[str, Any]] = {"Bert": {}, "Roberta": {}, "Electra": {}, "XLMRoberta": {}}
DECODERS: dict[str, dict[str, Any]] = {"Llama": GROUPED, "Qwen2": GROUPED, "GPT2": {}, "GPTNeoX": {}}


def model_of(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SMALL | {**ENCODERS, **DECODERS}.get(family, {}) | more
    )
    task = "ForSequenceClassification" if family in ENCODERS else "ForCausalLM"
    auto = {"GPT2ForCausalLM": "GPT2LMHeadModel"}.get(family + task, family + task)
    made = getattr(transformers, auto)(config).to(dtype).eval().requires_grad_(False)
    assert attend_our_way(made)
    return made


def base_of(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Base:
    model = model_of(family, dtype, **more)
    if family not in ENCODERS:
        return Base(model, None, Instruction(), (), family, None, packing_of(model, None))
    heads = tuple(n for n, m in model.named_children() if n != model.base_model_prefix and [*m.parameters()])
    after = only_first_token(model)
    return Base(model, None, Classification(), heads, family, after, packing_of(model, after))
