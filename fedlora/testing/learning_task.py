"""The promises of a learning task, each a check of its own, and one call that tries them all.

    from fedlora.testing import check_learning_task

    check_learning_task(MyTask(), [{"text": "a b", "score": 1.5}, {"text": "c", "score": 0.0}])

The checks load a model for the task, in float64, and encode the records with its tokenizer.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example, Row
from fedlora.models import Base, MultiAdapterModel, load, targets
from fedlora.models.packaged import tiny
from fedlora.tasks import LearningTask
from fedlora.testing.promises import Broken, broken_of, report, what_came
from fedlora.training.evaluation import losses_of

CLOSE = 1e-6  # relative; the model computes in float64
LENGTH = 128  # tokens of a row


@dataclasses.dataclass(frozen=True)
class Tried:
    """A task with rows, and the model that was loaded for it.

    Args:
        task: what is checked.
        rows: of the records.
        labels: the names of the model's outputs.
        base: the model.
        examples: the rows, encoded.
    """

    task: LearningTask
    rows: Sequence[Row]
    labels: tuple[str, ...]
    base: Base
    examples: Sequence[Example]


def check_learning_task(
    task: LearningTask, records: Sequence[Mapping[str, Any]], model: str | Path | None = None
) -> None:
    """Try every promise on a learning task.

    Args:
        task: an instance, with the settings that are to be checked.
        records: two or more, with a key for each of the task's columns, of texts of different lengths.
        model: a folder or a hub name; None takes the tiny random encoder (`model=tiny`).

    Raises:
        AssertionError: some promises are broken; a line names each and says what came.
    """
    report(type(task).__name__, broken(task, records, model))


def broken(
    task: LearningTask, records: Sequence[Mapping[str, Any]], model: str | Path | None = None
) -> Iterator[tuple[str, str]]:
    """The promises that a task breaks: the name of each, and what came."""
    try:
        columns = {role: role for role in task.columns}
        rows = [task.row(record, columns, f"record {at}") for at, record in enumerate(records)]
        labels = task.labels(rows, rows, None, "the records")
        base = load(model or tiny(), task, labels, dtype="float64")
        examples = task.encode(rows, labels, base.tokenizer, LENGTH)
    except Exception as error:
        yield "records become examples of a loaded model", what_came(error)
        return
    yield from broken_of(PROMISES, Tried(task, rows, labels, base, examples))


def equal_tasks_are_one(one: Tried) -> None:
    """A frozen dataclass is equal to a copy of itself, with one hash, so that runs share a loaded model."""
    copy = dataclasses.replace(one.task) if dataclasses.is_dataclass(one.task) else None
    if copy != one.task or hash(copy) != hash(one.task):
        raise Broken("expected a frozen dataclass, which is equal to a copy of itself and has its hash")


def metrics_are_numbers_and_the_headline_is_among_them(one: Tried) -> None:
    """What stands in the files of a run, by name."""
    found = one.task.metrics(0.5, 0.25)
    json.dumps(found, allow_nan=False)
    if one.task.headline not in found or "loss" not in found:
        raise Broken(f"expected 'loss' and the headline {one.task.headline!r}, got {', '.join(found)}")
    one.task.metrics(math.nan, math.nan)  # of clients without rows


def rows_can_be_hashed(one: Tried) -> None:
    """Runs of one process share the tokens of equal rows."""
    hash(tuple(one.rows))


def every_row_has_an_example_and_no_more_tokens_than_allowed(one: Tried) -> None:
    """Rows are cut to `max_length`, and counted."""
    if len(one.examples) != len(one.rows) or min(example.size for example in one.examples) < 1:
        raise Broken(f"expected an example of a token or more for each of {len(one.rows)} rows")
    most = max(example.size for example in one.examples) - 1
    cut = one.task.encode(one.rows, one.labels, one.base.tokenizer, most)
    if max(example.size for example in cut) > most:
        raise Broken(f"with max_length={most} there are {max(example.size for example in cut)} tokens")
    lost = sum(example.size > most for example in one.examples)
    if (count := one.task.count_cut(one.rows, cut, one.base.tokenizer, most)) != lost:
        raise Broken(f"with max_length={most} {lost} rows lose tokens, count_cut says {count}")


def a_row_s_loss_and_score_are_its_own(one: Tried) -> None:
    """Clients share a batch, and privacy bounds what one row does."""
    together = _losses(one.base, one.examples)
    for at, example in enumerate(one.examples):
        for name, alone, whole in zip(("loss", "score"), _losses(one.base, [example]), together, strict=True):
            if whole.shape != (len(one.examples),):
                raise Broken(f"expected one {name} a row, ({len(one.examples)},), got {tuple(whole.shape)}")
            if not torch.allclose(alone[0], whole[at].to(alone), rtol=CLOSE, atol=CLOSE):
                raise Broken(f"row {at} has the {name} {alone[0]:.4g} alone, and {whole[at]:.4g} with others")


def rows_end_to_end_have_the_same_losses(one: Tried) -> None:
    """A model that can read rows without padding gets them so, in training."""
    padded = _losses(one.base, one.examples)
    with torch.no_grad(), MultiAdapterModel(one.base, [Task(Adapter({}))]) as clients:
        if not clients.unpadded:
            return
        packed = losses_of(one.base, clients, [(0, example) for example in one.examples], 1)
    for name, one_way, other in zip(("loss", "score"), padded, packed, strict=True):
        if not torch.allclose(one_way.to(other), other, rtol=CLOSE, atol=CLOSE):
            raise Broken(f"losses_unpadded gives another {name} than scores of the padded rows")


def the_loss_is_finite_and_reaches_what_is_trained(one: Tried) -> None:
    """Every loss has a gradient; the layers of the model take part in the loss of a made-up row."""
    losses, scores = _losses(one.base, one.examples)
    if not (losses.isfinite().all() and scores.isfinite().all()):
        raise Broken(f"expected finite losses and scores, got {losses.tolist()} and {scores.tolist()}")
    if not targets(one.base, "all-linear"):
        raise Broken("no linear layer has a part in the loss of `probe`")
    if one.task.new_head != bool(one.base.heads):
        raise Broken(f"new_head is {one.task.new_head}, and the heads are {one.base.heads}")


def rows_without_targets_are_predicted(one: Tried) -> None:
    """One answer a row; a task that generates answers word for word, which is not tried here."""
    sources = [row.source for row in one.rows]
    examples = one.task.encode_sources(sources, one.base.tokenizer, LENGTH)
    said: Sequence[Any] = examples
    if not one.task.generates:
        logits = one.base.logits(one.base.collate(examples))
        said = one.task.predicted(logits.detach(), one.labels)
    if len(said) != len(one.rows):
        raise Broken(f"expected an answer to each of {len(one.rows)} rows, got {len(said)}")


def the_baseline_is_a_number(one: Tried) -> None:
    """Of an answer that reads no row."""
    json.dumps(one.task.baseline(one.rows, one.rows), allow_nan=False)


def _losses(base: Base, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    losses, scores = base.losses(base.collate(examples))
    return losses.detach(), scores.detach()


PROMISES = (
    equal_tasks_are_one,
    metrics_are_numbers_and_the_headline_is_among_them,
    rows_can_be_hashed,
    every_row_has_an_example_and_no_more_tokens_than_allowed,
    a_row_s_loss_and_score_are_its_own,
    rows_end_to_end_have_the_same_losses,
    the_loss_is_finite_and_reaches_what_is_trained,
    rows_without_targets_are_predicted,
    the_baseline_is_a_number,
)
