"""Losses and shares of right answers on rows, of adapters as they are."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ApartError
from fedlora.models import Base, MultiAdapterModel
from fedlora.training.batches import Micro, micro_batches
from fedlora.training.workers import Workers


def evaluate(
    base: Base, tasks: Sequence[Task], rows: Sequence[Sequence[Example]], tokens: int | None = None
) -> list[tuple[float, float]]:
    """The mean loss and the mean share of right answers of each task's adapter, as it is, on its own rows.

    Args:
        base: the frozen model.
        tasks: one a slot.
        rows: the rows of each; (nan, nan) where there are none.
        tokens: a micro-batch holds at most, padding included where the model needs it; None chooses by the
            rows.
    """
    tokens = base.memory.limit(tokens)
    try:
        return _together(base, tasks, rows, tokens)
    except ApartError:
        each = zip(tasks, rows, strict=True)
        return [_together(base, [task], [own], tokens)[0] for task, own in each]


@torch.no_grad()
def predictions(
    base: Base, task: Task, rows: Sequence[Example], labels: Sequence[str], tokens: int | None = None
) -> list[Any]:
    """What a task's adapter says of each row, such as its label, by `LearningTask.predicted`.

    Args:
        base: the frozen model, of a task that does not generate.
        task: its adapter, as it is.
        rows: encoded; their own targets are not read.
        labels: the names of the model's outputs.
        tokens: as for `evaluate`.
    """
    found: dict[int, Any] = {}
    micros = micro_batches(list(enumerate(rows)), base.memory.limit(tokens), base.traits)
    with MultiAdapterModel(base, [task], every_token=True) as bank:
        for micro in micros:
            bank.route([len(micro)])
            logits = base.logits(base.collate([row for _, row in micro]))
            found |= dict(zip((at for at, _ in micro), base.task.predicted(logits, labels), strict=True))
    return [found[at] for at in range(len(rows))]


def _together(
    base: Base, tasks: Sequence[Task], rows: Sequence[Sequence[Example]], tokens: int | None
) -> list[tuple[float, float]]:
    totals = [[0.0, 0.0] for _ in tasks]
    pool = [(slot, row) for slot, own in enumerate(rows) for row in own]
    with MultiAdapterModel(base, tasks, stacked=True) as bank, Workers(base) as workers:
        micros = micro_batches(pool, tokens, base.traits, not bank.unpadded)

        @torch.no_grad()
        def measure(micro: Micro) -> tuple[list[float], list[float]]:
            loss, right = losses_of(base, bank, micro, len(tasks))
            return loss.tolist(), right.tolist()

        for micro, found in zip(micros, workers.map(measure, micros), strict=True):
            for (slot, _), one, hit in zip(micro, *found, strict=True):
                totals[slot][0] += one
                totals[slot][1] += hit
    return [
        (loss / len(own), right / len(own)) if own else (math.nan, math.nan)
        for (loss, right), own in zip(totals, rows, strict=True)
    ]


def measure(
    base: Base,
    scores: Callable[[list[Example]], tuple[Tensor, Tensor]],
    rows: Sequence[Example],
    tokens: int | None = None,
) -> tuple[float, float]:
    """The means of two numbers a row, such as its loss and its share of right answers; (nan, nan) of none.

    Args:
        base: the frozen model, for its device.
        scores: the numbers of a micro-batch's rows, both (rows,); called from several threads.
        rows: all rows.
        tokens: padded tokens a micro-batch holds at most; None chooses by the rows.
    """
    tokens = base.memory.limit(tokens)

    @torch.no_grad()
    def sums(micro: Micro) -> list[float]:
        return [float(found.double().sum()) for found in scores([row for _, row in micro])]

    with Workers(base) as workers:
        found = list(workers.map(sums, micro_batches([(0, row) for row in rows], tokens, base.traits)))
    if not rows:
        return math.nan, math.nan
    return math.fsum(f[0] for f in found) / len(rows), math.fsum(f[1] for f in found) / len(rows)


def losses_of(base: Base, bank: MultiAdapterModel, micro: Micro, slots: int) -> tuple[Tensor, Tensor]:
    """Losses and shares of right answers of a micro-batch, each by its slot's adapter, (rows,) both."""
    held, rows = Counter(slot for slot, _ in micro), [row for _, row in micro]
    counts = [held[slot] for slot in range(slots)]
    if bank.unpadded:
        bank.route(counts, [row.size for row in rows])
        return base.losses_unpadded(rows)
    bank.route(counts)
    return base.losses(base.collate(rows))
