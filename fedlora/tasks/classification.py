"""Classification: one of a few labels for a text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedlora.core.natural_order import in_order
from fedlora.data.cells import text_in
from fedlora.data.dataset import Row
from fedlora.data.labels import NO_REGRESSION, check_classes
from fedlora.errors import DataError
from fedlora.tasks.base import LearningTask


@dataclass(frozen=True)
class Classification(LearningTask):
    """Learn the label of a text by cross-entropy.

    Labels stand in the order of `fedlora.core.natural_order.in_order`, integers by value.
    """

    name = "classification"
    columns = ("text", "label")
    headline = "accuracy"
    labelled = True
    needs = "labels need a text classifier, such as model=minilm"

    def row(self, record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
        """A text and its label."""
        column = columns["label"]
        if isinstance(record[column], float):
            raise DataError(f"{where}: expected a label in {column!r}, got the type float; {NO_REGRESSION}")
        label = text_in(record, column, where, numbers=True).strip()
        return Row(text_in(record, columns["text"], where), label)

    def labels(
        self, train: Sequence[Row], test: Sequence[Row], declared: Sequence[str] | None, where: str
    ) -> tuple[str, ...]:
        """Those that are declared, or else those of the training rows, or of the test rows without any.

        Raises:
            DataError: there are fewer than two labels, they are numbers to predict, or a row has another one.
        """
        if declared is not None or not train:
            names = {row.target for row in test} if declared is None else map(str, declared)
            known = tuple(in_order({*names}))
            self.check_rows([*train, *test], known, where)
            return known
        known = tuple(in_order({row.target for row in train}))
        if len(known) < 2:
            raise DataError(
                f"{where}: expected at least 2 labels in the training rows, got only "
                f"{known[0]!r}; check that the label column is the right one"
            )
        check_classes(known, where)
        unknown = Counter(row.target for row in test if row.target not in known)
        if unknown:
            label, count = unknown.most_common(1)[0]
            others = f" (and {len(unknown) - 1} more labels)" if len(unknown) > 1 else ""
            raise DataError(
                f"{where}: the label {label!r} of {count} test rows{others} is in no training "
                f"row; correct it, remove those test rows, or add training rows with it"
            )
        return known

    def check_rows(self, rows: Sequence[Row], labels: Sequence[str], where: str) -> None:
        """Check that there are two labels or more, and that every row has one of them.

        Raises:
            DataError: it is not so.
        """
        check_classes(labels, where)
        if len(labels) < 2:
            raise DataError(
                f"{where}: expected at least 2 labels, got {list(labels)}; name all with data.labels"
            )
        unknown = Counter(row.target for row in rows if row.target not in labels)
        if unknown:
            name, count = unknown.most_common(1)[0]
            raise DataError(
                f"{where}: the label {name!r} of {count} rows is none of the run's {list(labels)}; correct "
                "it, or name all labels with data.labels"
            )

    def group(self, row: Row) -> str:
        """The label."""
        return str(row.target)

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[int]:
        """The index of each row's label.

        Raises:
            DataError: a row has another label.
        """
        index = {label: i for i, label in enumerate(labels)}
        for number, row in enumerate(rows):
            if row.target not in index:
                raise DataError(
                    f"row {number}: expected one of the labels {', '.join(map(repr, labels)):.300}, "
                    f"got {row.target!r}; correct the label or leave the row out"
                )
        return [index[row.target] for row in rows]

    def options(self, labels: Sequence[str]) -> dict[str, Any]:
        """An output for each label, and its name in the model's configuration."""
        names = dict(enumerate(labels))
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    def scores(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of each row's label, and whether the label is the likeliest one."""
        right = (logits.argmax(-1) == target).to(logits.dtype)
        return F.cross_entropy(logits, target, reduction="none"), right

    def metrics(self, loss: float, score: float) -> dict[str, float]:
        """The loss and the accuracy."""
        return {"loss": loss, "accuracy": score}

    def predicted(self, logits: Tensor, labels: Sequence[str]) -> list[str]:
        """The likeliest label of each row."""
        return [labels[i] for i in logits.argmax(-1).tolist()]

    def baseline(self, train: Sequence[Row], test: Sequence[Row]) -> dict[str, float | None]:
        """The accuracy of always saying the label that is the most frequent one among the training rows."""
        if not train:
            return {"majority": None}
        counts = Counter(row.target for row in train)
        label = max(sorted(counts), key=counts.__getitem__)
        return {"majority": sum(row.target == label for row in test) / len(test)}
