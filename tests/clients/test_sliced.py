"""The sliced client: the numbers of local training, over a sealed channel whose bytes are counted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidTag
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedlora.clients import LocalTraining, SlicedTraining
from fedlora.clients.sliced import OVERHEAD, Channel, Cut, layers_of
from fedlora.core.messages import Task
from fedlora.data import Example, collate
from fedlora.errors import ConfigError, ModelError
from fedlora.models import Base, LoRA, MultiAdapterModel, fresh_adapter, targets
from fedlora.tasks import Classification, Instruction
from fedlora.training.client import TrainRequest

pytestmark = pytest.mark.slow

WIDTH = 16
OWN: dict[str, Any] = {"lr": 0.01, "batch_size": 4, "epochs": 2}


def _bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            pad_token_id=0,
        )
    )


def _distilbert() -> Any:
    config = DistilBertConfig(vocab_size=60, dim=WIDTH, n_layers=3, n_heads=2, hidden_dim=24, pad_token_id=0)
    return DistilBertForSequenceClassification(config)


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            pad_token_id=0,
        )
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32, pad_token_id=0)
    )


MODELS = {"bert": _bert, "distilbert": _distilbert, "llama": _llama, "gpt2": _gpt2}


def made(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    model.requires_grad_(False).eval().to(dtype)
    decoder = isinstance(model, LlamaForCausalLM) or type(model).__name__.endswith("LMHeadModel")
    heads = tuple(n for n, _ in model.named_children() if "classifier" in n)
    return Base(model, None, Instruction() if decoder else Classification(), heads, "made")


def rows(base: Base, number: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng([seed, 1])
    found = [rng.integers(2, 60, 3 + i % 5).tolist() for i in range(number)]
    if base.task.generates:
        return [Example(ids, [-100, *ids[1:]]) for ids in found]
    return [Example(ids, i % 2) for i, ids in enumerate(found)]


def work(base: Base, client: int = 0, names: Any = "all-linear") -> TrainRequest:
    shapes = targets(base, names)
    start = fresh_adapter(base, shapes, LoRA().peer(0, 2, shapes), base.heads)
    return TrainRequest(client, 1, 0, Task(start), rows(base, 9, client))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_sliced_training_is_local_training_bit_for_bit(name: str, cut: int, dtype: torch.dtype) -> None:
    base = made(MODELS[name], dtype)
    before = {n: value.clone() for n, value in base.model.state_dict().items()}
    for client in (0, 1):
        one = SlicedTraining.of(cut, **OWN).train(base, [work(base, client)])[0]
        other = LocalTraining(**OWN).train(base, [work(base, client)])[0]
        assert one.adapter.digest() == other.adapter.digest()
        assert {n: one.metrics[n] for n in other.metrics} == other.metrics
    assert all(torch.equal(value, before[n]) for n, value in base.model.state_dict().items())
    assert not any(m._forward_hooks for m in base.model.modules())


def test_gradients_over_the_cut_are_those_without_it() -> None:
    base = made(_bert)
    job = work(base)

    def grads(channel: Channel | None) -> list[torch.Tensor]:
        batch = collate(job.rows, 0)
        with MultiAdapterModel(base, [job.task], train=True) as bank:
            leaves = [p for found in bank.factors(0).values() for p in found]
            if channel is None:
                return list(torch.autograd.grad(base.losses(batch)[0].sum(), leaves))
            with Cut(base, 1, channel):
                return list(torch.autograd.grad(base.losses(batch)[0].sum(), leaves))

    channel = Channel("0/1")
    for one, other in zip(grads(None), grads(channel), strict=True):
        assert torch.equal(one, other)
    assert channel.bytes["up"] == channel.bytes["down"] > 0


@pytest.mark.parametrize(("dtype", "b"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_token_costs_its_hidden_states_and_their_gradients(dtype: torch.dtype, b: int) -> None:
    base = made(_llama, dtype)
    job = dataclasses.replace(work(base), rows=[Example([5] * 6, [-100] + [5] * 5) for _ in range(8)])
    metrics = SlicedTraining.of(1, **OWN).train(base, [job])[0].metrics
    tokens, messages = 8 * 6 * 2, 4  # two epochs of two batches, each one micro-batch
    assert metrics["cut_bytes_up"] == metrics["cut_bytes_down"] == b * tokens * WIDTH + messages * OVERHEAD
    assert metrics["cut_bytes_per_token"] == pytest.approx(2 * b * WIDTH + 2 * messages * OVERHEAD / tokens)


def test_no_gradient_comes_back_where_the_client_trains_nothing() -> None:
    base = made(_bert)
    job = work(base, names=["layer.2.*.query"])
    metrics = SlicedTraining.of(2, **OWN).train(base, [job])[0].metrics
    assert metrics["cut_bytes_up"] > 0
    assert metrics["cut_bytes_down"] == 0


def test_every_client_has_a_channel_of_its_own_in_any_group() -> None:
    base = made(_bert)
    jobs = [work(base, k) for k in range(3)]
    sliced = SlicedTraining.of(1, **OWN)
    together = sliced.train(base, jobs)
    for job, one in zip(jobs, together, strict=True):
        alone = sliced.train(base, [job])[0]
        assert alone.adapter.digest() == one.adapter.digest()
        assert alone.metrics == one.metrics
    local = LocalTraining(**OWN)
    assert sliced.evaluate(base, jobs) == local.evaluate(base, jobs)
    assert sliced.step_tokens(jobs[0].rows) == local.step_tokens(jobs[0].rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_message_is_sealed_and_bound_to_its_channel_and_way(dtype: torch.dtype) -> None:
    channel, tensor = Channel("3/7"), torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    message = channel.sealed(tensor, "up")
    assert tensor.view(torch.uint8).numpy().tobytes() not in message
    assert len(message) == tensor.nbytes + OVERHEAD == channel.bytes["up"]
    assert torch.equal(channel.receive(message, tensor, "up"), tensor)
    broken = message[:-1] + bytes([message[-1] ^ 1])
    for bad, way in ((broken, "up"), (message, "down"), (message[:12] + message[13:], "up")):
        with pytest.raises(InvalidTag):
            channel.receive(bad, tensor, way)
    with pytest.raises(InvalidTag):
        Channel("3/7").receive(message, tensor, "up")


def test_no_nonce_is_used_twice() -> None:
    channel, tensor = Channel("0/1"), torch.zeros(3)
    messages = [channel.sealed(tensor, way) for way in ("up", "down") * 50]
    assert len({message[:12] for message in messages}) == len(set(messages)) == 100


def test_what_comes_out_is_memory_of_its_own() -> None:
    tensor = torch.zeros(3)
    out = Channel("0/1").send(tensor, "up")
    out += 1
    assert not tensor.any()


@pytest.mark.parametrize("cut", [3, 4])
def test_the_cut_must_leave_a_layer_on_either_side(cut: int) -> None:
    base = made(_bert)
    with pytest.raises(ModelError, match="expected 1 to 2"):
        SlicedTraining.of(cut, **OWN).train(base, [work(base)])


@pytest.mark.parametrize("wrong", [0, -1, 1.5, None])
def test_a_cut_is_a_number_of_layers(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"client\.cut"):
        SlicedTraining.of(wrong, **OWN)


def test_a_model_without_known_layers_is_refused() -> None:
    class Odd(nn.Module):
        base_model = nn.Linear(2, 2)

    with pytest.raises(ModelError, match=r"Odd.*client=local"):
        layers_of(Base(Odd(), None, Classification(), (), "odd"))


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_known_models_are_found(name: str) -> None:
    assert len(layers_of(made(MODELS[name]))) == 3
