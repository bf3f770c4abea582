"""What a task adds to the base besides A and B, against a base whose weights were really changed."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import of_dense
from fedlora.core.messages import Task
from fedlora.data import collate
from fedlora.errors import ModelError
from fedlora.models import Base, MultiAdapterModel, targets
from fedlora.models.parametrizations import CoreMatrix, Sparse
from fedlora.models.parametrizations.sparse import places, spread
from fedlora.training.evaluation import evaluate
from fedlora.training.expert import GlobalExpert
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit

pytestmark = pytest.mark.slow  # whole runs

NAMES = ["bert", "gpt2"]  # linear layers, and Conv1D, whose weight is transposed


def seal(base: Base) -> str:
    digest = hashlib.sha256()
    for name, tensor in base.model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def changed(zoo: Any, name: str, changes: Mapping[str, Tensor]) -> Base:
    """Another base, with these (d_out, d_in) matrices added to its weights; gradients go through them."""
    base = zoo.base(name, double=True)
    modules = dict(base.model.named_modules())
    for module, change in changes.items():
        weight = modules[module].weight.detach()
        del modules[module].weight
        modules[module].weight = weight + (change if weight.shape == change.shape else change.T)
        if weight.shape == change.shape and name == "gpt2":
            modules[module].weight = weight + change.T  # a square Conv1D
    return base


def loss(base: Base, rows: Any) -> Tensor:
    return base.losses(collate(rows, base.tokenizer.pad_token_id))[0].mean()


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for found in groups.values() for p in found], lr=1.0)


def random(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(0.2 * np.random.default_rng([seed, 6]).standard_normal(shape))


def base_deltas(base: Base, seed: int, rank: int, modules: Any = "all-linear") -> dict[str, Pair]:
    found = {}
    for i, (m, (d_out, d_in)) in enumerate(targets(base, modules).items()):
        found[m] = Pair(random(seed + i, rank, d_in), random(seed + 50 + i, d_out, rank))
    return found


def product(
    pair: Pair, A: Tensor | None = None, B: Tensor | None = None, core: Tensor | None = None
) -> Tensor:
    A, B = pair.A if A is None else A, pair.B if B is None else B
    return pair.scale * (B @ A if core is None else B @ core @ A)


def leaves(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in adapter.tensors()}


def update(adapter: Adapter, own: Mapping[str, Tensor], module: str) -> Tensor:
    """The module's term as a function of its own tensors."""
    factors = {f: own[f"{module}.{f}"] for f in ("A", "B", "core") if f"{module}.{f}" in own}
    return product(adapter.pairs[module], **factors)


def check(
    zoo: Any,
    name: str,
    tasks: list[Task],
    more: Callable[[Task, Mapping[str, Tensor], str], Tensor] | None = None,
) -> None:
    """Losses and gradients of all slots at once are those of a changed base each; ours stays as it was."""
    base = zoo.base(name, double=True)
    before = seal(base)
    rows = [zoo.rows(base, 4, 7 + i) for i in range(len(tasks))]
    work = [FitJob(task, [own]) for task, own in zip(tasks, rows, strict=True)]
    fitted = fit(base, work, sgd, tokens=60)
    scores = evaluate(base, tasks, rows)
    for task, own_rows, one, (reported, _) in zip(tasks, rows, fitted, scores, strict=True):
        own = leaves(task.adapter)
        changes = {}
        for m in {**task.adapter.pairs, **task.base_delta, **targets(base, "all-linear")}:
            parts = [update(task.adapter, own, m)] if m in task.adapter.pairs else []
            parts += [product(task.base_delta[m])] if m in task.base_delta else []
            parts += [more(task, own, m)] if more is not None else []
            if parts:
                changes[m] = sum(parts[1:], parts[0])
        want = loss(changed(zoo, name, changes), own_rows)
        assert one.loss == pytest.approx(want.item(), rel=1e-9)
        assert reported == pytest.approx(want.item(), rel=1e-9)
        want.backward()
        after = dict(one.adapter.tensors())
        for tensor_name, start in task.adapter.tensors():
            module, _, factor = tensor_name.rpartition(".")
            pair = module in task.adapter.pairs and factor in "AB"
            trained = (factor in task.train and module not in task.frozen) if pair else True
            step = after[tensor_name] - start
            if trained:
                grad = own[tensor_name].grad
                assert grad.abs().max() > 1e-6
                torch.testing.assert_close(step, -grad, rtol=1e-8, atol=1e-11)
            else:
                assert torch.equal(after[tensor_name], start)
    assert seal(base) == before
    assert zoo.clean(base)


@pytest.mark.parametrize("name", NAMES)
def test_base_deltas_of_each_slot_are_as_if_its_base_were_changed(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    adapter = partial(zoo.adapter, base, head=False)
    one, two = base_deltas(base, 1, 2), base_deltas(base, 2, 3)
    gone = next(iter(two))
    two = {m: pair for m, pair in two.items() if m != gone}  # one module has no base delta in one slot
    check(
        zoo,
        name,
        [
            Task(adapter(2, seed=1), base_delta=one),
            Task(adapter(1, seed=2), base_delta=two),
            Task(adapter(3)),
        ],
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_base_delta_that_all_slots_share_is_added_once(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    one = base_deltas(base, 1, 2)
    copies = {m: Pair(p.A.clone(), p.B.clone(), p.scale) for m, p in one.items()}
    tasks = [
        Task(zoo.adapter(base, r, seed=r, head=False), base_delta=f)
        for r, f in ((1, one), (2, copies), (3, one))
    ]
    check(zoo, name, tasks)
    with MultiAdapterModel(base, tasks) as bank:
        assert all(len(pairs) == 1 for pairs in bank._layers._base_deltas.values())


@pytest.mark.parametrize("differ", ["A", "B", "scale"])
def test_base_deltas_that_differ_in_one_factor_or_in_scale_are_not_shared(zoo: Any, differ: str) -> None:
    base = zoo.base("bert", double=True)
    one = base_deltas(base, 1, 2)
    m = next(iter(one))
    value = getattr(one[m], differ)
    other = {**one, m: dataclasses.replace(one[m], **{differ: value + 1e-3})}
    check(zoo, "bert", [Task(zoo.adapter(base, 2, head=False), base_delta=f) for f in (one, one, other)])


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_base_delta_and_a_base_delta_outside_the_adapter(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    every = targets(base, "all-linear")
    dense = {m: of_dense(random(i, *shape)) for i, (m, shape) in enumerate(every.items())}
    few = {m: p for m, p in zoo.adapter(base, 2, head=False).pairs.items() if m != next(iter(every))}
    check(zoo, name, [Task(Adapter(few), base_delta=dense), Task(Adapter(few))])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", ["", "AB"])
def test_a_core_between_the_factors(zoo: Any, name: str, train: str) -> None:
    base = zoo.base(name, double=True)
    tasks = []
    for rank in (1, 3):
        adapter = zoo.adapter(base, rank, seed=rank, head=False)
        cores = {f"{m}.core": random(rank, rank, rank) + 0.5 for m in adapter.pairs}
        adapter = Adapter(adapter.pairs, cores, CoreMatrix())
        tasks.append(Task(adapter, frozenset(train), frozenset(train)))
    check(zoo, name, tasks)
    with MultiAdapterModel(base, tasks, train=True) as bank:
        assert set(bank.factors(0)) == {*train, "core"}


def sparse(base: Base, seed: int, mask: int, count: int) -> Task:
    values = {f"{m}.sparse": random(seed, count) for m in targets(base, "all-linear")}
    adapter = Adapter({}, values, Sparse(mask))
    return Task(adapter, frozenset(), frozenset(), base_delta=base_deltas(base, seed, 1))


@pytest.mark.parametrize("name", NAMES)
def test_values_at_sparse_places_are_a_dense_change_and_nothing_else_moves(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    shapes = targets(base, "all-linear")

    def term(task: Task, own: Mapping[str, Tensor], m: str) -> Tensor:
        values = own[f"{m}.sparse"]
        return spread(values, places(task.adapter.parametrization.seed, m, shapes[m], len(values)), shapes[m])  # type: ignore[arg-type]

    check(zoo, name, [sparse(base, 1, 5, 12), sparse(base, 2, 6, 12)], term)


def test_one_slot_s_places_are_not_the_other_s(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    rows = zoo.rows(base, 4, 1)
    one, other = sparse(base, 1, 5, 12), sparse(base, 1, 6, 12)
    scores = evaluate(base, [one, other, one], [rows] * 3)
    assert scores[0] == pytest.approx(scores[2], rel=1e-12)
    assert scores[0][0] != pytest.approx(scores[1][0], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_modules_work_as_they_are_and_do_not_move(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    adapter = zoo.adapter(base, 2, head=False)
    all_but = [frozenset([*adapter.pairs][:1] + [*adapter.pairs][4:]), frozenset([*adapter.pairs][1:])]
    few, first = (Task(adapter, frozen=frozen) for frozen in all_but)
    check(zoo, name, [few, first, Task(adapter)])
    with MultiAdapterModel(base, [few], train=True) as bank:
        assert {group: len(found) for group, found in bank.factors(0).items()} == {"A": 3, "B": 3}


def test_a_global_expert_is_not_added_to_the_adapter(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    adapter, rows = zoo.adapter(base, 2), zoo.rows(base, 4, 1)
    plain = Task(adapter)
    more = Task(adapter, method=(GlobalExpert(zoo.adapter(base, 3, seed=9)),))
    assert evaluate(base, [plain], [rows]) == evaluate(base, [more], [rows])


def test_a_base_delta_of_another_shape_or_of_no_module_is_refused(zoo: Any) -> None:
    base = zoo.base("bert")
    good = zoo.adapter(base, 2)
    m = next(iter(good.pairs))
    for bad, said in (
        ({m: Pair(torch.zeros(2, 7), torch.zeros(9, 2))}, rf"{m}' is \(9, 7\), the layer"),
        ({"bert.nowhere": good.pairs[m]}, r"'bert\.nowhere', a module that the model lacks"),
    ):
        with (
            pytest.raises(ModelError, match=said),
            MultiAdapterModel(base, [Task(good), Task(good, base_delta=bad)]),
        ):
            pass
    assert zoo.clean(base)
