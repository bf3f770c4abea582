"""The last layer of a classifier, computed for the token that its head reads."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Batch
from fedlora.errors import ModelError
from fedlora.models import Base, MultiAdapterModel, targets
from fedlora.models.first_token import only_first_token
from fedlora.models.hidden_states import HiddenStateHook
from fedlora.tasks import Classification

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 3,
    "pad_token_id": 1,
}
FIRST = ("Bert", "Roberta", "Electra", "XLMRoberta")
OTHER = ("DistilBert", "Llama")  # keep their layers elsewhere


def made(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    return model.double().eval().requires_grad_(False)


def batch(seed: int = 0) -> Batch:
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1], [5]])).long()
    return Batch({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 2, 0]))


def gradients(base: Base, every_token: bool) -> dict[str, torch.Tensor]:
    """Of the rows' losses by a LoRA on every linear layer and by the head, and the logits themselves."""
    draw = torch.Generator().manual_seed(1)
    shapes = targets(base, "all-linear").items()
    pairs = {
        n: Pair(*(torch.randn(s, generator=draw, dtype=torch.float64) for s in ((2, i), (o, 2))), 0.3)
        for n, (o, i) in shapes
    }
    with MultiAdapterModel(
        base, [Task(Adapter(pairs, base.head_state()))], train=True, every_token=every_token
    ) as bank:
        leaves = [p for found in bank.factors(0).values() for p in found]
        logits = base.logits(batch())
        loss = base.losses(batch())[0].sum()
        found = torch.autograd.grad(loss, leaves)
    return {"logits": logits.detach(), **{str(i): g for i, g in enumerate(found)}}


@pytest.mark.parametrize("family", FIRST)
def test_logits_and_all_gradients_are_those_of_the_whole_layer(family: str) -> None:
    model = made(family)
    heads = tuple(n for n, m in model.named_children() if n != model.base_model_prefix and [*m.parameters()])
    base = Base(model, None, Classification(), heads, family, only_first_token(model))
    assert base.after is not None
    narrow, whole = gradients(base, False), gradients(base, True)
    assert len(whole) > 20
    for name, value in whole.items():
        torch.testing.assert_close(narrow[name], value, rtol=1e-10, atol=1e-12)


def test_the_rest_of_the_layer_is_left_out_while_a_bank_is_open_and_no_longer() -> None:
    model = made("Bert")
    base = Base(model, None, Classification(), (), "bert", only_first_token(model))
    seen: list[int] = []
    model.bert.encoder.layer[-1].output.register_forward_pre_hook(lambda m, x: seen.append(x[0].shape[1]))
    base.logits(batch())
    with MultiAdapterModel(base, [Task(Adapter({}))]):
        base.logits(batch())
    with MultiAdapterModel(base, [Task(Adapter({}))], every_token=True):
        base.logits(batch())
    base.logits(batch())
    assert seen == [7, 1, 7, 7]


@pytest.mark.parametrize("family", OTHER)
def test_what_keeps_its_layers_elsewhere_is_left_as_it_is(family: str) -> None:
    assert only_first_token(made(family)) is None


class MeanPooler(nn.Module):
    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.pooler(states.mean(1, keepdim=True))
        return pooled


def test_a_head_that_reads_every_token_gets_every_token() -> None:
    model = made("Bert")
    model.bert.pooler = MeanPooler(model.bert.pooler)
    assert only_first_token(model) is None
    assert not model.bert.encoder.layer[-1].attention.output._forward_pre_hooks


def test_a_head_of_zeros_proves_nothing() -> None:
    model = made("Bert")
    model.classifier.weight.data.zero_()
    assert only_first_token(model) is None


def test_a_tap_does_not_take_one_token_for_all() -> None:
    model = made("Bert")
    base = Base(model, None, Classification(), (), "bert", only_first_token(model))
    for every_token in (True, False):
        with (
            MultiAdapterModel(base, [Task(Adapter({}))], every_token=every_token),
            HiddenStateHook(base) as tap,
        ):
            base.logits(batch())
            if every_token:
                assert tap.pooled(batch().inputs["attention_mask"]).shape == (4, 16)
            else:
                with pytest.raises(ModelError, match="7 tokens, got 1"):
                    tap.pooled(batch().inputs["attention_mask"])
