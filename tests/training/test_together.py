"""Clients in stacks, as on a GPU: what each gets is what it gets by itself, whatever the others do."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import base_of

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, MultiAdapterModel, targets
from fedlora.models.products import Grouped, OneByOne, Parts, Products, products_on
from fedlora.training.evaluation import evaluate
from fedlora.training.rules import FedProx
from fedlora.training.steps import FitJob, Parameters
from fedlora.training.together import Together
from fedlora.training.trainer import fit

WAYS = [OneByOne(), Grouped()]


def rows(base: Base, count: int, seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, 60, (2 + (5 * i + seed) % 9,), generator=draw).tolist()
        found.append(Example(ids, i % 3 if base.heads else [-100, *ids[1:]]))
    return found


def job(base: Base, seed: int, rank: int, batches: Sequence[int], **more: Any) -> FitJob:
    draw = torch.Generator().manual_seed(seed)
    shapes = targets(base, "all-linear")
    pairs = {
        n: Pair(
            0.3 * torch.randn(rank, i, generator=draw),
            0.3 * torch.randn(o, rank, generator=draw),
            1 / (1 + seed),
        )
        for n, (o, i) in shapes.items()
    }
    task = Task(Adapter(pairs, base.head_state()), **more)
    return FitJob(task, [rows(base, size, 10 * seed + at) for at, size in enumerate(batches)])


def trained(base: Base, jobs: Sequence[FitJob], client: LocalTraining) -> list[Any]:
    return fit(base, jobs, client.make_optimizer, client.rate_factor, client.clip, client.micro_tokens)


def compare(one: Any, other: Any, tol: float) -> None:
    assert math.isclose(one.loss, other.loss, rel_tol=tol, abs_tol=tol)
    assert one.steps == other.steps
    mine, theirs = dict(one.adapter.tensors()), dict(other.adapter.tensors())
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
        )


SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD with momentum and a bound": {
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
        "clip": 0.05,
    },
    "weight decay, a schedule, LoRA+": {
        "optimizer": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
        "schedule": "cosine",
        "warmup": 0.3,
        "lr_ratio": 4.0,
    },
    "no bound, RMSprop": {"optimizer": lambda groups: torch.optim.RMSprop(groups), "clip": None},
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: type(way).__name__)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_each_client_is_trained_as_by_itself(family: str, settings: dict[str, Any], way: Products) -> None:
    base = base_of(family, torch.float32)
    client = LocalTraining(lr=0.01, **settings)
    # Of several ranks and numbers of steps, one without a row in a step that others take, one without any.
    jobs = [job(base, 0, 3, (4, 4, 2)), job(base, 1, 16, (3,)), job(base, 2, 1, (2, 5)), job(base, 3, 8, ())]
    apart = [trained(base, [one], client)[0] for one in jobs]
    together = trained(dataclasses.replace(base, products=way), jobs, client)
    for one, other in zip(together, apart, strict=True):
        compare(one, other, 2e-4)
    assert not torch.equal(
        together[0].adapter.pairs[next(iter(together[0].adapter.pairs))].B,
        jobs[0].task.adapter.pairs[next(iter(together[0].adapter.pairs))].B,
    )


@pytest.mark.parametrize("train", [frozenset({"B"}), frozenset({"A", "B"}), frozenset({"B", "head"})])
def test_what_is_not_trained_stays_as_it_was(train: frozenset[str]) -> None:
    base = base_of("Bert", torch.float32)
    client = LocalTraining(lr=0.01, optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))
    frozen = frozenset({sorted(targets(base, "all-linear"))[0]})
    jobs = [job(base, seed, 2 + seed, (4, 3), train=train, frozen=frozen) for seed in range(3)]
    apart = [trained(base, [one], client)[0] for one in jobs]
    for mine, one, other in zip(
        jobs, trained(dataclasses.replace(base, products=Grouped()), jobs, client), apart, strict=True
    ):
        compare(one, other, 2e-4)
        before, after = dict(mine.task.adapter.tensors()), dict(one.adapter.tensors())
        for name in before.keys() - set(mine.task.trained()):
            assert torch.equal(before[name], after[name]), name


def test_rules_and_base_deltas_are_each_client_s_own() -> None:
    base = base_of("Llama", torch.float32)
    client = LocalTraining(lr=0.01, rules=[FedProx(0.5)])
    draw = torch.Generator().manual_seed(9)
    jobs = []
    for seed in range(3):
        made = job(base, seed, 2 + seed, (3, 3))
        base_delta = {
            n: Pair(
                torch.randn(2, p.shape[1], generator=draw), torch.randn(p.shape[0], 2, generator=draw), 0.05
            )
            for n, p in made.task.adapter.pairs.items()
        }
        task = dataclasses.replace(made.task, base_delta=base_delta, method=tuple(client.rules))
        jobs.append(dataclasses.replace(made, task=task))
    apart = [trained(base, [one], client)[0] for one in jobs]
    for one, other in zip(
        trained(dataclasses.replace(base, products=Grouped()), jobs, client), apart, strict=True
    ):
        compare(one, other, 2e-4)


class Mine(torch.optim.SGD):
    """An optimizer of which nobody knows what it does."""


def test_an_optimizer_of_the_user_s_own_sees_one_client_at_a_time() -> None:
    base = dataclasses.replace(base_of("Bert", torch.float32), products=Grouped())
    seen: list[int] = []

    def make(groups: Parameters) -> torch.optim.Optimizer:
        parameters = [p for found in groups.values() for p in found]
        seen.append(sum(p.numel() for p in parameters))
        return Mine(parameters, lr=0.1)

    jobs = [job(base, seed, 2, (4, 3, 2)[: 3 - seed]) for seed in range(3)]
    alone = [fit(dataclasses.replace(base, products=None), [one], make, clip=0.1)[0] for one in jobs]
    own = seen[0]
    together = fit(base, jobs, make, clip=0.1)
    assert seen[-3:] == [own] * 3
    for one, other in zip(together, alone, strict=True):
        compare(one, other, 1e-4)


def test_a_client_that_diverges_leaves_the_others_alone() -> None:
    base = dataclasses.replace(base_of("Llama", torch.float32), products=Grouped())
    client = LocalTraining(lr=0.01)
    good, bad = job(base, 0, 4, (4, 4)), job(base, 1, 4, (4, 4))
    name = next(iter(bad.task.adapter.pairs))
    pair = bad.task.adapter.pairs[name]
    broken = {**bad.task.adapter.pairs, name: dataclasses.replace(pair, B=pair.B * math.nan)}
    bad = dataclasses.replace(bad, task=dataclasses.replace(bad.task, adapter=Adapter(broken)))
    alone = trained(base, [good], client)[0]
    one, other = trained(base, [good, bad], client)
    compare(one, alone, 1e-5)
    assert math.isnan(other.loss)


def test_in_bfloat16_the_factors_stay_float32_and_the_result_is_near() -> None:
    base = base_of("Llama", torch.bfloat16)
    client = LocalTraining(lr=0.01)
    jobs = [job(base, seed, 3 + seed, (4, 4)) for seed in range(3)]
    apart = trained(base, jobs, client)
    for one, other, mine in zip(
        trained(dataclasses.replace(base, products=Grouped()), jobs, client), apart, jobs, strict=True
    ):
        assert one.loss == pytest.approx(other.loss, rel=0.03)
        for name, tensor in one.adapter.tensors():
            assert tensor.dtype == torch.float32
            moved = tensor - dict(mine.task.adapter.tensors())[name]
            wanted = dict(other.adapter.tensors())[name] - dict(mine.task.adapter.tensors())[name]
            assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), 0) > 0.9, name


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_evaluation_of_many_adapters_at_once_is_that_of_each(family: str) -> None:
    base = base_of(family, torch.float32)
    jobs = [job(base, seed, 1 + 3 * seed, (5,)) for seed in range(4)]
    tasks, own = [one.task for one in jobs], [one.batches[0] for one in jobs]
    plain = evaluate(base, tasks, own)
    for found, wanted in zip(
        evaluate(dataclasses.replace(base, products=Grouped()), tasks, own), plain, strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_one_optimizer_moves_all_clients_of_a_stack() -> None:
    base = dataclasses.replace(base_of("Bert", torch.float32), products=Grouped())
    made: list[torch.optim.Optimizer] = []

    def make(groups: Parameters) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW([{"params": found} for found in groups.values()], lr=0.01))
        return made[-1]

    fit(base, [job(base, seed, 4, (3,)) for seed in range(5)], make)
    assert len(made) == 1
    assert [len(group["params"]) for group in made[0].param_groups][:2] == [1, 1]
    assert Together.lockstep


def test_a_layer_that_is_never_called_is_refused() -> None:
    base = dataclasses.replace(base_of("Bert", torch.float32), products=Grouped())
    made = job(base, 0, 2, (3,))
    pairs = dict(made.task.adapter.pairs)
    dead = torch.nn.Linear(16, 16)
    base.model.bert.encoder.add_module("dead", dead)
    pairs["bert.encoder.dead"] = Pair(torch.ones(2, 16), torch.ones(16, 2))
    task = dataclasses.replace(made.task, adapter=Adapter(pairs, base.head_state()))
    with pytest.raises(Exception, match="2 of the tensors to train got no gradient"):
        trained(base, [dataclasses.replace(made, task=task)], LocalTraining(lr=0.01))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: type(way).__name__)
@pytest.mark.parametrize("counts", [(5, 0, 3), (0, 0, 1), (4,), (1, 1, 1, 1)])
def test_products_are_those_of_each_part(way: Products, counts: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    parts, n, k = Parts(counts), sum(counts), len(counts)
    x, y = torch.randn(n, 24, generator=draw), torch.randn(n, 8, generator=draw)
    W = torch.randn(k, 8, 24, generator=draw)
    owner = torch.arange(k).repeat_interleave(torch.tensor(counts))
    torch.testing.assert_close(way.rows(x, W.mT, parts), torch.einsum("na,nba->nb", x, W[owner]))
    wanted = torch.stack([y[owner == at].T @ x[owner == at] for at in range(k)])
    torch.testing.assert_close(way.outer(y, x, parts), wanted)
    spread = parts.spread(tuple(range(k)), torch.float32)
    assert (spread == owner[:, None]).all() if k > 1 else spread == 0


def test_a_cpu_keeps_each_client_s_own_parameters() -> None:
    assert products_on(torch.device("cpu"), torch.bfloat16) is None
    base = base_of("Bert", torch.float32)
    with MultiAdapterModel(base, [job(base, 0, 2, (1,)).task], train=True, stacked=True) as bank:
        assert bank.stacks is None
