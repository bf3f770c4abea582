"""FedMS's client: what the mixture computes, what it trains, and what it leaves alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.clients import GatedExperts, LocalTraining
from fedlora.clients.gated import Mixture
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, Task
from fedlora.data import Example, collate
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, MultiAdapterModel, fresh_adapter, targets
from fedlora.strategies import FedMS
from fedlora.tasks import Instruction
from fedlora.training.client import TrainRequest
from fedlora.training.evaluation import evaluate
from fedlora.training.expert import GlobalExpert

CLIENT = GatedExperts.of(lr=0.01, batch_size=4, epochs=2)


def rows(number: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng([seed, 1])
    return [Example(rng.integers(2, 200, 3 + i % 5).tolist(), i % 2) for i in range(number)]


def moved(adapter: Adapter, seed: int) -> Adapter:
    rng = np.random.default_rng([seed, 8])

    def off(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.from_numpy(0.3 * rng.standard_normal(tensor.shape)).to(tensor)

    pairs = {m: Pair(off(p.A), off(p.B), p.scale) for m, p in adapter.pairs.items()}
    return Adapter(pairs, {name: off(tensor) for name, tensor in adapter.extra.items()})


def expert(base: Base, seed: int = 0, head: bool = True) -> Adapter:
    shapes = targets(base, "all-linear" if base.task.generates else ["query", "value"])
    return moved(fresh_adapter(base, shapes, LoRA().peer(0, 2, shapes), base.heads if head else ()), seed)


def gate(width: int, seed: int = 0, large: float = 0.0) -> Adapter:
    """A random gate; or, if `large`, one that says the same whatever it sees."""
    rng = np.random.default_rng([seed, 4])
    A = torch.from_numpy(rng.standard_normal((2, width + 1))).float()
    B = torch.from_numpy(rng.standard_normal((2, 2))).float()
    if large:
        A = torch.zeros(2, width + 1)
        A[:, -1], B = 1.0, torch.tensor([[large, 0.0], [-large, 0.0]])
    return Adapter({}, {"gate.A": A, "gate.B": B})


def work(base: Base, common: Adapter, own: Adapter | None = None, **more: Any) -> TrainRequest:
    width = common.pairs[common.top_down()[0]].shape[1]
    task = Task(
        more.pop("gate", None) or gate(width), frozenset(), frozenset(), method=(GlobalExpert(common),)
    )
    memory = {f"local/{n}": t for n, t in own.tensors()} if own else {}
    return TrainRequest(0, 1, 0, task, more.pop("rows", rows(11)), memory)


def logits(base: Base, adapter: Adapter, found: list[Example]) -> torch.Tensor:
    with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]):
        return base.logits(collate(found, base.pad_id))


@pytest.fixture
def decoder() -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=24,
                initializer_range=0.3,
                pad_token_id=0,
            )
        )
    return Base(model.requires_grad_(False).eval(), None, Instruction(), (), "made")


def test_stage_1_is_local_training_bit_for_bit(base: Base) -> None:
    own = [
        TrainRequest(
            k, 1, 0, Task(expert(base, k), frozen=frozenset(expert(base).top_down()[3:])), rows(9, k)
        )
        for k in range(2)
    ]
    local = LocalTraining(lr=0.01, batch_size=4, epochs=2)
    for one, other in zip(CLIENT.train(base, own), local.train(base, own), strict=True):
        assert one.adapter.digest() == other.adapter.digest()
        assert one.metrics == other.metrics
        assert not one.memory
    assert CLIENT.evaluate(base, own) == local.evaluate(base, own)
    assert CLIENT.step_tokens(rows(9)) == local.step_tokens(rows(9))


@pytest.mark.parametrize(("large", "whose"), [(1e4, 0), (-1e4, 1)])
def test_a_one_hot_gate_is_the_expert_that_it_picks(base: Base, large: float, whose: int) -> None:
    common, own = expert(base, 1), expert(base, 2)
    job = work(base, common, own, gate=gate(32, large=large))
    want = evaluate(base, [Task((common, own)[whose])], [job.rows])[0]
    other = evaluate(base, [Task((common, own)[1 - whose])], [job.rows])[0]
    assert CLIENT.evaluate(base, [job])[0] == pytest.approx(want, rel=1e-6)
    assert abs(want[0] - other[0]) > 1e-2


def test_without_a_memory_both_experts_are_the_global_one(base: Base) -> None:
    common = expert(base, 1)
    want = evaluate(base, [Task(common)], [rows(11)])[0]
    assert CLIENT.evaluate(base, [work(base, common)])[0] == pytest.approx(want, rel=1e-5)


def test_the_mixture_is_that_of_the_formula(base: Base) -> None:
    common, own = expert(base, 1), expert(base, 2)
    job = work(base, common, own)
    seen: list[torch.Tensor] = []
    place = base.model.get_submodule(common.top_down()[0])
    handle = place.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = collate(job.rows, base.pad_id)
    g, o = logits(base, common, job.rows), logits(base, own, job.rows)
    handle.remove()
    real = batch.inputs["attention_mask"].double()[:, :, None]
    assert not real.all()
    h = (seen[0].double() * real).sum(1) / real.sum(1)
    one = np.concatenate([h.numpy(), np.ones((len(h), 1))], 1)
    A, B = (job.task.adapter.extra[f"gate.{x}"].double().numpy() for x in "AB")
    z = one @ A.T @ B.T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = p[:, :1] * g.double().numpy() + p[:, 1:] * o.double().numpy()
    target = batch.target.numpy()
    want = np.log(np.exp(y).sum(1)) - y[np.arange(len(y)), target]
    with torch.no_grad(), Mixture(base, job) as mixture:
        loss, right = mixture.scores(list(job.rows))
    assert np.allclose(loss.numpy(), want, atol=1e-5)
    assert (right.bool().numpy() == (y.argmax(1) == target)).all()
    assert np.ptp(p[:, 0]) > 0.05


def test_stage_2_trains_the_gate_and_the_local_expert_alone(base: Base) -> None:
    common = expert(base, 1)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    job = work(base, common)
    kept, sent = common.digest(), job.task.adapter.digest()
    outcome = CLIENT.train(base, [job])[0]
    assert common.digest() == kept
    assert job.task.adapter.digest() == sent
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not outcome.adapter.pairs
    assert list(outcome.adapter.extra) == ["gate.A", "gate.B"]
    for name, tensor in outcome.adapter.extra.items():
        assert not torch.equal(tensor, job.task.adapter.extra[name])
    assert set(outcome.memory) == {f"local/{name}" for name, _ in common.tensors()}
    for name, tensor in common.tensors():
        assert not torch.equal(outcome.memory[f"local/{name}"], tensor), name
    assert outcome.metrics["steps"] == 6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_client_of_small_capacity_trains_so_many_modules_of_its_own_expert(
    base: Base, capacity: int
) -> None:
    common = expert(base, 1)
    state = FedMS(global_rounds=0, active=4, capacity=(capacity,)).init(common)
    task = FedMS(global_rounds=0, active=4, capacity=(capacity,)).task(state, Peer(0, 2))
    back = Task.unpack(*task.pack())  # as it travels
    outcome = CLIENT.train(base, [TrainRequest(0, 1, 0, back, rows(11))])[0]
    changed = {
        m
        for m, pair in common.pairs.items()
        for factor, tensor in pair.factors()
        if not torch.equal(outcome.memory[f"local/{m}.{factor}"], tensor)
    }
    assert changed == set(common.top_down()[:capacity])
    with Mixture(base, TrainRequest(0, 1, 0, back, rows(11)), train=True) as mixture:
        trained = sum(t.requires_grad for name, group in mixture.parameters.items() for t in group)
    assert trained == 2 * capacity + len(common.extra) + 2


def test_the_mixture_learns_and_goes_on_from_its_memory(base: Base) -> None:
    job, losses, client = work(base, expert(base, 1)), [], GatedExperts.of(lr=0.03, batch_size=4, epochs=2)
    for round in range(1, 6):
        outcome = client.train(base, [dataclasses.replace(job, round=round)])[0]
        losses.append(outcome.metrics["loss"])
        job = dataclasses.replace(
            job, memory=outcome.memory, task=dataclasses.replace(job.task, adapter=outcome.adapter)
        )
    assert losses[-1] < 0.8 * losses[0]
    assert CLIENT.evaluate(base, [job])[0][0] < losses[1]


def test_the_result_is_the_same_in_any_group_and_size_of_micro_batches(base: Base) -> None:
    jobs = [work(base, expert(base, 1), expert(base, 2 + k), rows=rows(9, k)) for k in range(2)]
    plain = TrainRequest(5, 1, 0, Task(expert(base)), rows(5))
    alone = [CLIENT.train(base, [job])[0] for job in jobs]
    mixed = CLIENT.train(base, [jobs[0], plain, jobs[1]])
    for one, other in zip(alone, (mixed[0], mixed[2]), strict=True):
        assert one.adapter.digest() == other.adapter.digest()
    assert mixed[1].adapter.digest() == CLIENT.train(base, [plain])[0].adapter.digest()
    small = GatedExperts.of(lr=0.01, batch_size=4, epochs=2, micro_tokens=8).train(base, jobs[:1])[0]
    for name, tensor in small.memory.items():
        assert torch.allclose(tensor, alone[0].memory[name], atol=1e-4)


def test_a_frozen_head_stays_the_bases(base: Base) -> None:
    outcome = CLIENT.train(base, [work(base, expert(base, 1, head=False))])[0]
    assert all(name.endswith((".A", ".B")) for name in outcome.memory)


def test_a_decoders_gate_sees_nothing_of_later_tokens(decoder: Base) -> None:
    common, own = expert(decoder, 1, head=False), expert(decoder, 2, head=False)
    first, other = [5, 6, 7, 8], [5, 6, 7, 30]

    def loss(ids: list[int]) -> float:
        row = Example(ids, [-100, 6, 7, -100])  # the last token is told to nobody
        with torch.no_grad(), Mixture(decoder, work(decoder, common, own, rows=[row])) as mixture:
            return float(mixture.scores([row])[0])

    assert loss(first) == pytest.approx(loss(other), rel=1e-6)
    assert CLIENT.train(decoder, [work(decoder, common, own, rows=[Example(first, [-100, 6, 7, 8])])])


def test_an_expert_without_pairs_is_refused(base: Base) -> None:
    head = Adapter({}, base.head_state())
    job = TrainRequest(
        0, 1, 0, Task(gate(0), frozenset(), frozenset(), method=(GlobalExpert(head),)), rows(3)
    )
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        CLIENT.train(base, [job])
