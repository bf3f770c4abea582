"""Each row's own gradient is what autograd gives for the row alone, whoever else is in the batch."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example, collate
from fedlora.errors import ModelError
from fedlora.models import Base, MultiAdapterModel
from fedlora.models.parametrizations import CoreMatrix, DoRA, Sparse
from fedlora.models.per_row import call_rows
from fedlora.privacy import self_test
from fedlora.privacy import selftest as module

pytestmark = pytest.mark.slow  # whole runs

RANKS, COUNTS, SCALES = (1, 3, 20), (3, 1, 4), (2.0, 0.7, 1.3)
MODELS = ("bert", "roberta", "distilbert", "bert-mlm", "llama", "gpt2", "llama-cls", "gpt2-cls")


def tasks(
    zoo: Any, base: Base, train: str = "AB", head: bool = True, ranks: Sequence[int] = RANKS
) -> list[Task]:
    return [
        Task(zoo.adapter(base, rank, scale, seed=k, head=head), frozenset(train))
        for k, (rank, scale) in enumerate(zip(ranks, SCALES, strict=False))
    ]


def together(base: Base, work: Sequence[Task], rows: Sequence[Sequence[Example]]) -> list[list[Tensor]]:
    """For each slot its parameters' gradients, (rows, *shape)."""
    with MultiAdapterModel(base, work, train=True, per_row=True) as bank:
        bank.route([len(own) for own in rows])
        losses, _ = base.losses(collate([row for own in rows for row in own], base.pad_id))
        found = []
        for slot in range(len(work)):
            parameters = [p for group in bank.factors(slot).values() for p in group]
            grads = torch.autograd.grad(losses.sum(), bank.leaves(parameters), retain_graph=True)
            assert [g.shape[1:] for g in grads] == [p.shape for p in parameters]
            found.append(list(grads))
        return found


def alone(base: Base, task: Task, row: Example) -> list[Tensor]:
    """One row, unpadded, by the ordinary path."""
    with MultiAdapterModel(base, [task], train=True) as bank:
        losses, _ = base.losses(collate([row], base.pad_id))
        parameters = [p for group in bank.factors(0).values() for p in group]
        return list(torch.autograd.grad(losses.sum(), parameters))


def check(zoo: Any, base: Base, work: list[Task], counts: Sequence[int] = COUNTS) -> None:
    rows = [zoo.rows(base, n, seed=k) for k, n in enumerate(counts)]
    for task, own, found in zip(work, rows, together(base, work, rows), strict=True):
        for i, row in enumerate(own):
            for want, got in zip(alone(base, task, row), found, strict=True):
                torch.testing.assert_close(got[i], want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_k_clients_of_mixed_ranks_equal_autograd_row_by_row(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    check(zoo, base, tasks(zoo, base))


@pytest.mark.parametrize("train", ["A", "B", ""])
@pytest.mark.parametrize("name", ["bert", "llama-cls"])
def test_one_factor_or_the_head_alone_equal_autograd(zoo: Any, name: str, train: str) -> None:
    base = zoo.base(name, double=True)
    check(zoo, base, tasks(zoo, base, train))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_with_a_frozen_head_the_rows_equal_autograd(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    check(zoo, base, tasks(zoo, base, head=False))


def test_a_core_a_base_delta_and_frozen_modules_equal_autograd(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    made = torch.Generator().manual_seed(1)
    work = []
    for task in tasks(zoo, base, "", ranks=(2, 5, 3)):
        pairs = task.adapter.pairs
        cores = {
            f"{m}.core": torch.randn(p.rank, p.rank, generator=made, dtype=torch.float64)
            for m, p in pairs.items()
        }
        adapter = Adapter(pairs, {**task.adapter.extra, **cores}, CoreMatrix())
        base_delta = zoo.adapter(base, 2, 1.0, seed=9).pairs
        work.append(replace(task, adapter=adapter, base_delta=base_delta, frozen=frozenset(list(pairs)[3:])))
    check(zoo, base, work)
    check(zoo, base, [replace(task, train=frozenset("AB")) for task in work])


def test_a_client_without_rows_has_no_gradients_and_the_others_have_theirs(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    work = tasks(zoo, base)
    rows = [zoo.rows(base, n, seed=k) for k, n in enumerate((2, 0, 3))]
    with MultiAdapterModel(base, work, train=True, per_row=True) as bank:
        bank.route([2, 0, 3])
        losses, _ = base.losses(collate([row for own in rows for row in own], base.pad_id))
        for slot, count in ((0, 2), (2, 3)):
            leaves = bank.leaves([p for group in bank.factors(slot).values() for p in group])
            for grad in torch.autograd.grad(losses.sum(), leaves, retain_graph=True):
                assert len(grad) == count


def test_the_sum_over_rows_is_the_ordinary_gradient_in_float32_too(zoo: Any) -> None:
    base = zoo.base("bert")
    [task] = tasks(zoo, base)[:1]
    rows = zoo.rows(base, 5, seed=1)
    [found] = together(base, [task], [rows])
    with MultiAdapterModel(base, [task], train=True) as bank:
        losses, _ = base.losses(collate(rows, base.pad_id))
        plain = torch.autograd.grad(losses.sum(), [p for g in bank.factors(0).values() for p in g])
    for want, got in zip(plain, found, strict=True):
        torch.testing.assert_close(got.sum(0), want, rtol=1e-4, atol=1e-5)


class Mixing(nn.Linear):
    """Rows see each other: the mean over the batch is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.5 * super().forward(x).mean(0, keepdim=True)


class Flat(nn.Linear):
    """Tokens are fed one by one, as a router of experts does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def planted(zoo: Any, cls: type[nn.Linear]) -> Base:
    base = zoo.base("bert")
    old = base.model.get_submodule("bert.encoder.layer.0.attention.self.value")
    new = cls(16, 16)
    new.requires_grad_(False).load_state_dict(old.state_dict())
    if cls is Flat:
        new.inner = old
    base.model.get_submodule("bert.encoder.layer.0.attention.self").value = new
    return base


def test_the_self_test_passes_honest_models_and_runs_once_a_form(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MODELS:
        base = zoo.base(name)
        task = tasks(zoo, base)[1]
        self_test(base, task)
        monkeypatch.setattr(module, "_gradients", None)
        self_test(base, Task(zoo.adapter(base, 3, 5.0, seed=8)))  # other values, the same form
        monkeypatch.undo()
    monkeypatch.setattr(module, "_gradients", None)
    with pytest.raises(TypeError):
        self_test(base, tasks(zoo, base, "A")[1])


def test_the_self_test_refuses_a_model_that_mixes_rows(zoo: Any) -> None:
    base = planted(zoo, Mixing)
    with pytest.raises(ModelError, match="depends on the other records of its batch"):
        self_test(base, tasks(zoo, base)[0])
    with pytest.raises(
        ModelError, match="depends on the other records"
    ):  # a failure is not remembered as done
        self_test(base, tasks(zoo, base)[0])


def test_a_layer_that_is_fed_tokens_is_refused(zoo: Any) -> None:
    base = planted(zoo, Flat)
    adapter = zoo.adapter(base, 2, modules=["inner"])
    assert any(".inner" in name for name in adapter.pairs)
    with pytest.raises(ModelError, match="cannot be told apart by record"):
        self_test(base, Task(adapter))


def test_what_has_no_gradient_of_rows_is_refused(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = zoo.adapter(base, 2)
    name = next(iter(adapter.pairs))
    lengths = Adapter(adapter.pairs, {**adapter.extra, f"{name}.magnitude": torch.ones(16)}, DoRA())
    with pytest.raises(ModelError, match="no gradient for each row"):
        MultiAdapterModel(base, [Task(lengths)], train=True, per_row=True)
    values = Adapter({}, {f"{name}.sparse": torch.ones(4)}, Sparse(3))
    with pytest.raises(ModelError, match="no gradient for each row"):
        MultiAdapterModel(base, [Task(values)], train=True, per_row=True)


class Slow(nn.Linear):
    """Lets other threads in before it looks at its weight."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(x)


def test_threads_that_call_one_head_get_their_own_parameters() -> None:
    head, rows = Slow(3, 2), torch.randn(4, 1, 3)
    given = [
        {"weight": torch.full((4, 2, 3), float(k)), "bias": torch.full((4, 2), float(k))} for k in range(6)
    ]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda own: call_rows(head, own, rows, (), {}), given))
    for k, got in enumerate(found):
        torch.testing.assert_close(got, k * (rows.sum(-1, keepdim=True) + 1).expand(4, 1, 2))
