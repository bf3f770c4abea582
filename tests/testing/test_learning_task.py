"""The public check of a learning task's promises: good tasks pass, and each broken promise is named."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from fedlora.data import Example, Row, text_in
from fedlora.tasks import Classification, LearningTask
from fedlora.testing import check_learning_task

RECORDS = [{"text": "a " * n + "b", "score": n / 2} for n in (3, 1, 5)]


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@dataclass(frozen=True)
class Size(LearningTask):
    """A number for a text, by the absolute error."""

    name = "size"
    columns = ("text", "score")
    headline = "loss"

    def row(self, record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
        return Row(text_in(record, columns["text"], where), record[columns["score"]])

    def options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1}

    def scores(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return (logits[:, 0] - target).abs(), (logits[:, 0] > target).float()

    def metrics(self, loss: float, score: float) -> dict[str, float]:
        return {"loss": loss, "above": score}


def test_good_tasks_pass() -> None:
    check_learning_task(Size(), RECORDS)
    check_learning_task(Classification(), [{"text": "a b c", "label": "x"}, {"text": "d", "label": "y"}])


def too_long(task: LearningTask, rows: Any, labels: Any, tokenizer: Any, max_length: int) -> list[Example]:
    return [Example(list(tokenizer(row.source)["input_ids"]), row.target) for row in rows]


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "equal tasks are one": ("__eq__", lambda task, other: task is other),
    "metrics are numbers and the headline": (
        "metrics",
        lambda task, loss, score: {"size": score},
    ),
    "rows can be hashed": ("row", lambda task, r, c, w: Row(r["text"], float(r["score"]), [])),  # type: ignore[arg-type]
    "every row has an example": ("encode", too_long),
    "count_cut says 9": ("count_cut", lambda task, *given: 9),
    "a row s loss and score are its own": (
        "scores",
        lambda task, logits, target: ((logits[:, 0] - logits.mean()).abs(), target),
    ),
    "one loss a row": ("scores", lambda task, logits, target: (logits.mean(), logits.mean())),
    "rows end to end have the same losses": (
        "losses_unpadded",
        lambda task, examples, starts, logits: (logits(None)[:, 0], logits(None)[:, 0]),
    ),
    "the loss is finite": ("scores", lambda task, logits, target: (logits[:, 0] / 0 * 0, logits[:, 0])),
    "the loss is finite and reaches": ("probe", lambda task, ids, number: Example(ids, "no target")),
    "rows without targets are predicted": ("predicted", lambda task, logits, labels: []),
    "the baseline is a number": ("baseline", lambda task, train, test: {"mean": float("nan")}),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_a_broken_promise_is_named(promise: str) -> None:
    name, method = BROKEN[promise]
    made = dataclasses.dataclass(frozen=True, eq=False)(
        type("Broken", (Size,), {name: method, "__hash__": Size.__hash__})
    )
    with pytest.raises(AssertionError, match=promise):
        check_learning_task(made(), RECORDS)
