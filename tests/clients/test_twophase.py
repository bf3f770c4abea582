"""pFedLoRA's client: two phases that leave each other's part alone, on models that need not be the same."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedlora.clients import LocalTraining, TwoPhase
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example, collate
from fedlora.errors import ConfigError, ModelError
from fedlora.models import Base, LoRA, MultiAdapterModel, fresh_adapter, targets
from fedlora.tasks import Classification, Instruction
from fedlora.training.client import TrainRequest

TARGETS = ["query", "value"]
OWN = {"lr": 0.01, "batch_size": 4, "epochs": 2}


def client(mu: float = 0.5, **more: Any) -> TwoPhase:
    return TwoPhase.of(mu, 6, 2, TARGETS, **OWN | more)


def rows(number: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng([seed, 1])
    return [Example(rng.integers(2, 200, 3 + i % 5).tolist(), i % 2) for i in range(number)]


def theta(seed: int = 0) -> Adapter:
    rng = np.random.default_rng([seed, 2])
    A, B = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((3, 6), (2, 3)))
    return Adapter({"shared": Pair(A, B, 2.0)})


def work(number: int = 9, shared: Adapter | None = None, **more: Any) -> TrainRequest:
    return TrainRequest(more.pop("client", 0), 1, 0, Task(shared or theta()), rows(number), **more)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def other_base() -> Base:
    """A narrower model of three layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=300,
            hidden_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            pad_token_id=0,
        )
        model = BertForSequenceClassification(config)
    return Base(model.requires_grad_(False).eval(), None, Classification(), ("classifier",), "other")


def test_the_shared_pair_goes_from_the_common_width_to_the_labels(base: Base) -> None:
    assert client().shared(base) == client().shared(other_base()) == {"shared": (2, 6)}
    decoder = dataclasses.replace(base, task=Instruction())
    with pytest.raises(ModelError, match="strategy=fedsalora"):
        client().shared(decoder)


def test_each_phase_leaves_the_others_part_bit_for_bit(base: Base) -> None:
    frozen = {name: value.clone() for name, value in base.model.state_dict().items()}
    job, it = work(), client()
    with it.personal(base, job, train=True) as model:
        before = model.memory()
        assert model.theta().digest() == job.task.adapter.digest()
        model.first(it.local, it.local.batches(job), 1.0)
        assert model.theta().digest() == job.task.adapter.digest()
        own = model.memory()
        assert own.keys() == before.keys()
        assert not any(torch.equal(own[n], before[n]) for n in own if not n.endswith("pooler.dense.bias"))
        model.second(it.local, it.local.batches(job), 1.0)
        assert same(model.memory(), own)
        after = dict(model.theta().tensors())
        assert not any(torch.equal(after[n], t) for n, t in job.task.adapter.tensors())
    outcome = it.train(base, [job])[0]
    assert same(outcome.memory, own)
    assert same(dict(outcome.adapter.tensors()), after)
    assert outcome.adapter.pairs["shared"].scale == 2.0
    assert same(dict(base.model.state_dict()), frozen)
    assert not any(m._forward_hooks for m in base.model.modules())


def test_with_mu_zero_phase_1_knows_nothing_of_the_shared_adapter(base: Base) -> None:
    def local(mu: float, seed: int) -> Any:
        return client(mu).train(base, [work(shared=theta(seed))])[0].memory

    assert same(local(0.0, 0), local(0.0, 1))
    assert not same(local(0.5, 0), local(0.5, 1))
    modules = targets(base, TARGETS)
    start = fresh_adapter(base, modules, LoRA().peer(0, 2, modules), base.heads)
    plain = LocalTraining(**OWN).train(base, [dataclasses.replace(work(), task=Task(start))])[0]
    for name, tensor in plain.adapter.tensors():
        assert torch.allclose(local(0.0, 0)[f"local/{name}"], tensor, atol=1e-5), name


def test_with_mu_one_the_local_head_learns_nothing(base: Base) -> None:
    it = client(1.0, optimizer=torch.optim.SGD)
    found, head = it.train(base, [work()])[0].memory, base.head_state()
    assert torch.equal(found["local/classifier.weight"], head["classifier.weight"])


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_the_personal_prediction_is_the_weighted_mean_of_both(base: Base, mu: float) -> None:
    outcome = client(mu).train(base, [work()])[0]
    job = dataclasses.replace(work(7, outcome.adapter), memory=outcome.memory)
    modules = targets(base, TARGETS)
    fresh = fresh_adapter(base, modules, LoRA().peer(0, 2, modules), base.heads)
    found = {n: outcome.memory[f"local/{n}"] for n, _ in fresh.tensors()}
    pairs = {m: Pair(found[f"{m}.A"], found[f"{m}.B"], 2.0) for m in fresh.pairs}
    own = Adapter(pairs, {name: found[name] for name in fresh.extra})
    batch = collate(job.rows, base.pad_id)
    with torch.no_grad(), MultiAdapterModel(base, [Task(own)], every_token=True):
        local = base.logits(batch).double().numpy()
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        states = base.model.base_model(input_ids=ids, attention_mask=mask)[0].double().numpy()
    real = mask.double().numpy()[:, :, None]
    h = (states * real).sum(1) / real.sum(1)
    pair = outcome.adapter.pairs["shared"]
    P, A, B = (t.double().numpy() for t in (client(mu).personal(base, job)._P, pair.A, pair.B))
    beside = 2.0 * h @ P.T @ A.T @ B.T

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p = mu * softmax(beside) + (1 - mu) * softmax(local)
    target = batch.target.numpy()
    want = -np.log(p[np.arange(len(p)), target]).mean(), (p.argmax(1) == target).mean()
    assert client(mu).evaluate(base, [job])[0] == pytest.approx(want, rel=1e-5)


def test_clients_of_different_models_share_one_adapter(base: Base) -> None:
    small = [Example([i % 200 for i in row.input_ids], row.target) for row in rows(9)]
    one = client().train(base, [work()])[0]
    two = client().train(other_base(), [dataclasses.replace(work(client=1), rows=small)])[0]
    assert one.memory.keys() != two.memory.keys()
    shapes = [{n: t.shape for n, t in o.adapter.tensors()} for o in (one, two)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("width", [6, 32, 40])
def test_all_clients_of_one_model_have_one_projection_in_every_round(base: Base, width: int) -> None:
    # θ reads P h: were P trained, the mean of A would be one of maps from inputs that drift apart.
    it = dataclasses.replace(client(), width=width)
    rng = np.random.default_rng(3)
    A, B = (torch.from_numpy(rng.standard_normal(s)).float() for s in ((3, width), (2, 3)))
    shared = Adapter({"shared": Pair(A, B, 2.0)})
    after = it.train(base, [work(shared=shared)])[0]
    later = dataclasses.replace(work(client=5, shared=after.adapter), round=4, memory=after.memory)
    P, other = (it.personal(base, job)._P for job in (work(shared=shared), later))
    assert torch.equal(P, other)
    assert P.shape == (width, 32)
    product = (P @ P.T if width <= 32 else P.T @ P).double()
    assert torch.allclose(product, torch.eye(min(width, 32), dtype=torch.float64), atol=1e-6)


def test_a_client_goes_on_from_what_it_kept(base: Base) -> None:
    job, losses = work(), []
    for round in range(1, 6):
        outcome = client(lr=0.02).train(base, [dataclasses.replace(job, round=round)])[0]
        losses.append((outcome.metrics["loss"], outcome.metrics["adapter_loss"]))
        job = dataclasses.replace(job, memory=outcome.memory, task=Task(outcome.adapter))
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert losses[-1][1] < 0.8 * losses[0][1]
    assert outcome.metrics["steps"] == 6


def test_the_result_is_the_same_in_any_group(base: Base) -> None:
    jobs = [work(9, theta(0)), work(6, theta(1), client=1)]
    together = client().train(base, jobs)
    for job, one in zip(jobs, together, strict=True):
        alone = client().train(base, [job])[0]
        assert alone.adapter.digest() == one.adapter.digest()
        assert same(alone.memory, one.memory)


def test_no_rows_no_numbers(base: Base) -> None:
    assert all(math.isnan(x) for x in client().evaluate(base, [work(0)])[0])
    assert client().step_tokens(rows(5)) == LocalTraining(**OWN).step_tokens(rows(5))


@pytest.mark.parametrize("wrong", [{"mu": -0.1}, {"mu": 1.1}, {"width": 0}, {"rank": 0}, {"rank": 1.5}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"client.{next(iter(wrong))}"):
        TwoPhase(LocalTraining(lr=0.1), **wrong)
