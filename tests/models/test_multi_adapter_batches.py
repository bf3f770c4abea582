import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import collate
from fedlora.errors import ModelError
from fedlora.models import Base, MultiAdapterModel, Traits, fresh_adapter, merge, targets
from fedlora.models.lora import LoRA
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_bfloat16_base_trains_float32_adapters(zoo: Any, name: str) -> None:
    base = zoo.base(name, dtype="bfloat16")
    shapes = targets(base, "all-linear")
    start = fresh_adapter(base, shapes, LoRA().peer(0, 3, shapes), base.heads)
    jobs = [FitJob(Task(start), [zoo.rows(base, 4, seed)]) for seed in range(2)]
    for one in fit(
        base, jobs, lambda groups: torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)
    ):
        assert {tensor.dtype for _, tensor in one.adapter.tensors()} == {torch.float32}
        assert all(torch.isfinite(tensor).all() for _, tensor in one.adapter.tensors())
        assert one.adapter.digest() != start.digest()


def logits(base: Base, adapter: Adapter, rows: Any) -> Tensor:
    with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]):
        return base.logits(collate(rows, base.tokenizer.pad_token_id))


def test_slots_of_one_batch_each_see_their_own_adapter_and_head(zoo: Any) -> None:
    for name in ("bert", "roberta", "gpt2-cls", "llama"):
        base = zoo.base(name, double=True)
        adapters = [zoo.adapter(base, r, s, seed=r) for r, s in ((1, 2.0), (4, 0.7), (2, 1.0))]
        rows = [zoo.rows(base, 2, 1, 5)[:1] * 3, [], zoo.rows(base, 2, 1, 5)[:1] * 2]
        batch = collate([row for own in rows for row in own], base.tokenizer.pad_token_id)
        with torch.no_grad(), MultiAdapterModel(base, [Task(adapter) for adapter in adapters]) as bank:
            bank.route([3, 0, 2])
            got = base.logits(batch)
        torch.testing.assert_close(got[:3], logits(base, adapters[0], rows[0]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got[3:], logits(base, adapters[2], rows[2]), rtol=1e-10, atol=1e-10)
        assert (got[0] - got[3]).abs().max() > 1e-3


class Crossed(nn.Module):
    """Feeds a layer an input that is not contiguous, over tokens and over features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig(pad_token_id=0)
        self.embed, self.query = nn.Embedding(60, 8), nn.Linear(8, 8)
        self.mix, self.score = nn.Linear(4, 4, bias=False), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids[:, :4])
        x = self.query(x.transpose(1, 2).contiguous().transpose(1, 2)).tanh()
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return type("Output", (), {"logits": self.score(x.mean(1))})()


PADDED: dict[str, Any] = {"after": None, "packing": None}  # a model of these tests knows no positions


def test_inputs_that_are_not_contiguous(zoo: Any) -> None:
    real = zoo.base("bert")
    base = dataclasses.replace(
        real,
        model=Crossed().double().requires_grad_(False),
        heads=("score",),
        after=None,
        packing=None,
        traits=Traits(),
    )
    rows = [row for row in zoo.rows(real, 30, 0) if len(row.input_ids) > 3]
    jobs = []
    for k in range(2):
        torch.manual_seed(k)
        query = Pair(torch.randn(2, 8).double(), torch.randn(8, 2).double())
        mix = Pair(torch.randn(1, 4).double(), torch.randn(4, 1).double(), 0.5)
        jobs.append(FitJob(Task(Adapter({"query": query, "mix": mix})), [rows[4 * k : 4 * k + 4]]))
    plain = [logits(base, job.task.adapter, job.batches[0]) for job in jobs]
    for job, got in zip(jobs, plain, strict=True):
        merged = dataclasses.replace(base, model=Crossed().double())
        merge(merged, job.task.adapter)
        torch.testing.assert_close(merged.logits(collate(job.batches[0], 0)), got, rtol=1e-9, atol=1e-9)

    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)

    for job, fused in zip(jobs, fit(base, jobs, sgd), strict=True):
        assert zoo.gap(fit(base, [job], sgd)[0].adapter, fused.adapter) < 1e-9


class Relative(nn.Module):
    """Like DeBERTa's attention: position embeddings of batch size 1 go through a projection, too."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.config = flat, PretrainedConfig(pad_token_id=0)
        self.embed, self.query = nn.Embedding(60, 8), nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.randn(1, 1, 8))
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids) * attention_mask[..., None]
        if self.flat:
            y = self.query(x.flatten(0, 1)).view(x.shape)
        else:
            y = self.query(x) + self.query(self.positions)
        return type("Output", (), {"logits": self.score(y.mean(1))})()


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_cannot_be_told_apart_are_refused_by_name_and_work_alone(zoo: Any, flat: bool) -> None:
    real = zoo.base("bert")
    base = dataclasses.replace(
        real,
        model=Relative(flat).requires_grad_(False),
        heads=("score",),
        after=None,
        packing=None,
        traits=Traits(),
    )
    pair = Pair(torch.randn(2, 8), torch.randn(8, 2))
    job = FitJob(Task(Adapter({"query": pair})), [zoo.rows(real, 4, 0)])

    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)

    [alone] = fit(base, [job], sgd)
    assert not torch.equal(alone.adapter.pairs["query"].B, pair.B)
    with pytest.raises(ModelError, match=r"'query' is fed .* rows .* engine\.fuse=1"):
        fit(base, [job, job], sgd)
    assert zoo.clean(base)
