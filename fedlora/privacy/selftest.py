"""A check before private training: are a model's per-row gradients those of each row alone?

In some models a row's output depends on the other rows of its batch, or a layer's input has no row dimension.
Clipping per-row gradients then bounds nothing. The check uses made-up rows and factors, so it reveals nothing
about any data.
"""

import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Pair
from fedlora.core.messages import Task
from fedlora.core.parametrization import Parametrization
from fedlora.data import Example
from fedlora.errors import ModelError
from fedlora.models import Base, MultiAdapterModel
from fedlora.models.stacks import Stacks
from fedlora.models.trial import lengths, made_up
from fedlora.seeds import generator

TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 2e-2}  # relative difference that rounding alone causes
FINE = 1e-3
# For each model the forms of tasks that have passed.
_passed: weakref.WeakKeyDictionary[nn.Module, set[tuple[Parametrization, str]]] = weakref.WeakKeyDictionary()


def self_test(base: Base, task: Task) -> None:
    """Compare the gradients of rows in batches, formed as in training, with those of each row alone.

    The result is cached for each model and form of task.

    Raises:
        ModelError: they differ, so this model cannot be trained privately with these targets.
    """
    form = _form(task)
    passed = _passed.setdefault(base.model, set())
    if form is not None and form in passed:
        return
    made = _made_up(base, task)
    rows = _rows(base)
    alone = [_gradients(base, made, [row], False)[0] for row in rows]
    together: dict[int, list[Tensor]] = {}
    for batch in _batches(base, rows):
        found = _gradients(base, made, [rows[at] for at in batch], True)
        together |= dict(zip(batch, found, strict=True))
    tolerance = TOLERANCE.get(next(base.model.parameters()).dtype, FINE)
    for one, other in zip(alone, (together[at] for at in range(len(rows))), strict=True):
        whole = torch.stack([g.double().norm() for g in one]).norm()
        for want, got in zip(one, other, strict=True):
            size = max(float(want.double().norm()), float(whole) * 1e-2, 1e-12)
            gap = float((want.double() - got.double()).norm()) / size
            if not gap < tolerance:
                raise ModelError(
                    f"private training: a record's gradient depends on the other records of its batch (by "
                    f"{gap:.1e}, for a tensor of shape {tuple(want.shape)}), so that clipping bounds "
                    "nothing; choose other lora.targets or another model"
                )
    if form is not None:
        passed.add(form)


def _form(task: Task) -> tuple[Parametrization, str] | None:
    """What decides how rows meet in a layer: how the tensors are used, and their names and shapes.

    The parametrization counts as an object, so that two classes of one name differ. None where it has no
    hash, as with a mapping among its settings: such a task is tested every time.
    """
    tensors = [f"{name}{tuple(tensor.shape)}" for name, tensor in task.adapter.tensors()]
    form = (task.adapter.parametrization, f"{task.trained()} {sorted(task.base_delta)} {tensors}")
    try:
        hash(form)
    except TypeError:
        return None
    return form


def _made_up(base: Base, task: Task) -> Task:
    """The task with random factors: with B = 0, as at the start of training, A would have no gradient."""
    rng = generator(0, "self-test")

    def normal(like: Tensor, spread: float) -> Tensor:
        return torch.from_numpy(rng.normal(0, spread, tuple(like.shape))).to(like)

    pairs = {
        name: Pair(normal(pair.A, pair.shape[1] ** -0.5), normal(pair.B, 0.1 * pair.rank**-0.5), pair.scale)
        for name, pair in task.adapter.pairs.items()
    }
    extra = {name: value + normal(value, 0.02) for name, value in task.adapter.extra.items()}
    return replace(task, adapter=replace(task.adapter, pairs=pairs, extra=extra))


def _rows(base: Base) -> list[Example]:
    """Rows of the lengths with which loading tried the model, the longest first, which comes twice."""
    longest, *shorter = lengths(base.model, base.room)
    rows = made_up(base.model, base.tokenizer, base.pad_id, [longest, longest, *shorter])
    return [base.task.probe(ids, number) for number, ids in enumerate(rows)]


def _batches(base: Base, rows: list[Example]) -> list[list[int]]:
    """Indices of the rows that may share a batch; the rows are ordered by falling length."""
    found: list[list[int]] = []
    for at, row in enumerate(rows):
        if not found or not base.traits.together(rows[found[-1][0]].size, row.size):
            found.append([])
        found[-1].append(at)
    return found


def _gradients(base: Base, task: Task, rows: list[Example], per_row: bool) -> list[list[Tensor]]:
    """The gradients of all trained parameters, a list for each row; without `per_row` there is one row."""
    with MultiAdapterModel(base, [task], train=True, per_row=per_row, stacked=per_row) as bank:
        parameters = [p for found in bank.factors(0).values() for p in found]
        if per_row and bank.unpadded:
            bank.route([len(rows)], [row.size for row in rows])
            losses, _ = base.losses_unpadded(rows)
        else:
            bank.route([len(rows)])
            losses, _ = base.losses(base.collate(rows))
        if bank.stacks:
            return _of_stacks(bank.row_gradients(losses.sum(), [0]), bank.stacks, parameters)
        leaves = bank.leaves(parameters)
        found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    if not per_row:
        return [grads]
    if any(len(g) != len(rows) for g in grads):
        raise ModelError(f"private training: expected gradients of {len(rows)} records, got another number")
    return [[g[i] for g in grads] for i in range(len(rows))]


def _of_stacks(rows: Tensor, stacks: Stacks, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """The gradients of the one slot's parameters, a list for each row, from those in the order of stacks."""
    [places] = stacks.indices()
    if places is not None:
        factors = sum(value.shape[1] for value in stacks.values.values())
        rows = torch.cat([rows[:, places], rows[:, factors:]], dim=1)
    each = [row.split([p.numel() for p in parameters]) for row in rows]
    return [[g.view(p.shape) for g, p in zip(row, parameters, strict=True)] for row in each]
