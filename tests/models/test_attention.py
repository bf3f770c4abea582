"""A model in bfloat16 attends in float32 on the CPU, and says the same."""

from pathlib import Path

import pytest
import torch
import transformers

from fedlora.models import load
from fedlora.models.attention import OURS, attend_our_way
from fedlora.models.packaged import tiny


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_a_model_in_bfloat16_is_widened_and_its_logits_stay(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    base = load(tiny(), "classification", ("x", "y", "z"), dtype=dtype)
    assert base.model.config._attn_implementation == (OURS)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny(), num_labels=3, dtype=getattr(torch, dtype)
    ).eval()
    plain.load_state_dict(base.model.state_dict())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in (base.model, plain))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


def test_gradients_of_a_decoder_with_grouped_heads_are_those_of_float32() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    ids = torch.randint(1, 50, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7]])).long()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
        if dtype == torch.bfloat16:
            assert attend_our_way(model)
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        logits = model(inputs_embeds=x, attention_mask=mask).logits
        (grad,) = torch.autograd.grad((logits.float() * mask[..., None]).square().sum(), x)
        found[dtype] = grad.float()
    apart = (found[torch.bfloat16] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert apart < 0.05
