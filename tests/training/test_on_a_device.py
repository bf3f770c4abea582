"""A step on a device: its tensors are all there, and the host waits for none of them.

The device is torch's "meta", whose tensors have shapes and no values. A tensor of the CPU that meets one of
them is an error there, as on a GPU, and so is every look at a value, for which a GPU would have to be waited
for. What a model computes is not seen; other tests see to that.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, attention, packing
from fedlora.models.lora import layer_shape
from fedlora.models.memory import Memory
from fedlora.models.pack import Pack, VarlenPack
from fedlora.models.packing import Packing
from fedlora.models.products import Grouped, OneByOne, Products
from fedlora.privacy import Mechanism, Source
from fedlora.tasks import Classification, Instruction
from fedlora.training.rules import FedProx
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODELS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)
    ),
    "GPT2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)),
    "Bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_labels=3)
    ),
}


def base_of(family: str, kind: type[Pack], products: Products | None) -> Base:
    with torch.device("meta"):
        model: Any = MODELS[family]().to(torch.bfloat16).eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "takes_our_attention", lambda model: True)
        assert attention.attend_our_way(model)
    if family == "Bert":
        after = model.bert.encoder.layer[-1].attention.output
        heads = ("bert.pooler", "classifier")
        return Base(model, None, Classification(), heads, family, after, Packing(0, kind), products=products)
    vocabulary = None if family == "GPT2" else model.lm_head
    return Base(model, None, Instruction(), (), family, None, Packing(0, kind, vocabulary), products=products)


def job(base: Base, seed: int, batches: int) -> FitJob:
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [
        n
        for n, m in base.model.named_modules()
        if isinstance(m, linear) and n not in base.heads and not n.startswith(("lm_head", "bert.pooler"))
    ]
    pairs = {}
    for name in names:
        d_out, d_in = layer_shape(base.model.get_submodule(name), name)
        pairs[name] = Pair(torch.zeros(seed + 2, d_in), torch.zeros(d_out, seed + 2), 1 / (1 + seed))
    extra = {name: torch.zeros(tensor.shape) for name, tensor in base.head_state().items()}
    rows = []
    for i in range(4):
        ids = [3 + (7 * i + j + seed) % 60 for j in range(2 + (i + seed) % 5)]
        rows.append(Example(ids, i % 3 if base.heads else [-100, *ids[1:]]))
    return FitJob(Task(Adapter(pairs, extra), method=(FedProx(0.1),)), [rows[:2], rows[2:]][:batches])


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tensors whose values are looked at, which are zeros."""
    found: list[int] = []
    cpu, tolist = Tensor.cpu, Tensor.tolist

    def to_cpu(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else cpu(tensor)

    def values(tensor: Tensor) -> Any:
        if not tensor.is_meta:
            return tolist(tensor)
        found.append(tensor.numel())
        return [0.0] * tensor.numel()

    monkeypatch.setattr(Tensor, "cpu", to_cpu)
    monkeypatch.setattr(Tensor, "tolist", values)
    return found


@pytest.mark.parametrize("products", [Grouped(), OneByOne(), None], ids=["grouped", "one by one", "apart"])
@pytest.mark.parametrize("kind", [VarlenPack, Pack])
@pytest.mark.parametrize("family", MODELS)
def test_a_round_looks_at_values_once_at_its_end(
    family: str, kind: type[Pack], products: Products | None, looks: list[int]
) -> None:
    base = base_of(family, kind, products)
    jobs = [job(base, seed, 1 + seed % 2) for seed in range(3)]
    client = LocalTraining(lr=1e-3, schedule="cosine")
    found = fit(base, jobs, client.make_optimizer, client.rate_factor, client.clip, 16)
    rows = sum(len(batch) for one in jobs for batch in one.batches)
    assert sum(looks) == rows  # a loss each
    if products is not None:
        assert len(looks) == 1
    for one in found:
        assert {tensor.device.type for _, tensor in one.adapter.tensors()} == {"cpu"}


@pytest.mark.parametrize("products", [Grouped(), OneByOne()], ids=["grouped", "one by one"])
@pytest.mark.parametrize("family", ["Qwen3", "Bert"])
def test_a_private_round_looks_at_losses_and_at_how_many_rows_were_clipped(
    family: str, products: Products, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped: list[int] = []
    whole = Tensor.__int__

    def count(tensor: Tensor) -> int:
        if not tensor.is_meta:
            return whole(tensor)
        clipped.append(tensor.numel())
        return 0

    monkeypatch.setattr(Tensor, "__int__", count)
    base = base_of(family, VarlenPack, products)
    jobs = [
        replace(one, mechanism=Mechanism(1.0, 0.5, 2, Source(f"{seed}")))
        for seed, one in enumerate(job(base, seed, 1 + seed % 2) for seed in range(3))
    ]
    jobs[1] = replace(jobs[1], batches=[[], *jobs[1].batches])  # an empty Poisson batch
    client = LocalTraining(lr=1e-3, schedule="cosine")
    found = fit(base, jobs, client.make_optimizer, client.rate_factor, None, 16)
    assert len(looks) == 1
    assert clipped == [1] * len(jobs)
    assert [one.steps for one in found] == [1, 3, 1]


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_neither_does_one_with_checkpointed_layers_and_logits_in_pieces(
    family: str, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PIECE", 2 * 64)
    base = base_of(family, VarlenPack, Grouped())
    object.__setattr__(base, "memory", Memory(checkpointing=True))
    jobs = [job(base, seed, 2) for seed in range(3)]
    client = LocalTraining(lr=1e-3)
    fit(base, jobs, client.make_optimizer, client.rate_factor, client.clip, 16)
    assert len(looks) == 1
