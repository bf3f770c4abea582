"""Rows with their targets, and the data set that a run trains and tests on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from fedlora.data.labels import check_classes
from fedlora.errors import ConfigError, DataError
from fedlora.seeds import generator

if TYPE_CHECKING:  # the tasks are made of rows, so that this module cannot import them
    from fedlora.tasks import LearningTask


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, not yet encoded.

    The learning task decides what source and target are. Both can be hashed.

    Args:
        source: what the model reads: the text, or the prompt.
        target: what it is to learn: the label, or the response.
        client: who holds the row by nature (a hospital, a speaker, a domain), if anyone.
    """

    source: Any
    target: Any
    client: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Training and test rows of one learning task; `build` checks them.

    Args:
        name: for messages and reports.
        task: what is learnt from the rows.
        train: the rows that are dealt to clients.
        test: the held-out rows.
        labels: the names of the model's outputs in their order, by `LearningTask.labels`; empty where the
            outputs have no names.
        published: whether the training rows are public anyway, as those of packaged sets are.
        declared: whether the labels were named apart from the rows.
        cut: whether the test rows were cut from the training rows.
    """

    name: str
    task: "LearningTask"
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]
    published: bool = False
    declared: bool = False
    cut: bool = False

    @classmethod
    def build(
        cls,
        name: str,
        task: "LearningTask",
        train: Sequence[Row],
        test: Sequence[Row],
        labels: Sequence[str] | None = None,
        published: bool = False,
        cut: bool = False,
    ) -> Self:
        """Check the rows and collect the labels, unless all are named.

        Raises:
            DataError: a part is empty, or the task cannot use the rows, such as those of one label alone.
        """
        for part, rows in (("training", train), ("test", test)):
            if not rows:
                raise DataError(f"data set {name!r}: expected {part} rows, got none; check the {part} file")
        known = task.labels(train, test, labels, f"data set {name!r}")
        declared = labels is not None and bool(known)
        return cls(name, task, tuple(train), tuple(test), known, published, declared, cut)


def hold_out(
    rows: Sequence[Row], task: "LearningTask", test_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Shuffle the rows and cut off a test part: `test_rows` rows, but at most a fifth.

    One row of every label always stays in training, so that no test label is unknown.

    Args:
        rows: all rows.
        task: what is learnt from them.
        test_rows: how many rows to hold out.
        seed: of the shuffle.

    Returns:
        The training rows and the test rows.

    Raises:
        ConfigError: fewer than one row was asked for.
        DataError: no row can be held out.
    """
    if test_rows < 1:
        raise ConfigError(f"test_rows: expected at least 1, got {test_rows}")
    order = generator(seed, "split").permutation(len(rows)).tolist()
    first = {rows[i].target: i for i in reversed(order)} if task.labelled else {}
    staying = set(first.values())
    held = [i for i in order if i not in staying][: min(test_rows, len(rows) // 5)]
    if not held:
        check_classes(first, "the label column")
        labels = f" with {len(first)} labels" if first else ""
        raise DataError(
            f"no test row can be held out of {len(rows)} rows{labels}: at most a fifth is held out and one "
            f"row of each label stays; add rows or give test rows of their own"
        )
    testing = set(held)
    return [rows[i] for i in order if i not in testing], [rows[i] for i in held]
