"""Rows of text with their targets, and the data set that a run trains and tests on."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from fedlora.core.natural_order import INTEGER, in_order
from fedlora.errors import ConfigError, DataError
from fedlora.seeds import generator

Kind = Literal["classification", "instruction"]
DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+)")
MANY = 50  # integers that are classes are seldom more
NO_REGRESSION = (
    "regression is not available yet; if the numbers are classes, write them as whole numbers or words"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One example.

    Args:
        source: the text, or the prompt.
        target: the label, or the response.
        client: who holds the row by nature (a hospital, a speaker, a domain), if anyone.
    """

    source: str
    target: str
    client: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Training and test rows of one task; `build` checks them.

    Args:
        name: for messages and reports.
        kind: whether a target is a label or free text.
        train: the rows that are dealt to clients.
        test: the held-out rows.
        labels: those that were declared or else those of the training rows, in the order of the model's
            outputs, which is that of `fedlora.core.natural_order.in_order` (integers by value); empty for
            instructions.
        published: whether the training rows are public anyway, as those of packaged sets are.
        declared: whether the labels were named apart from the rows.
        cut: whether the test rows were cut from the training rows.
    """

    name: str
    kind: Kind
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
        kind: Kind,
        train: Sequence[Row],
        test: Sequence[Row],
        labels: Sequence[str] | None = None,
        published: bool = False,
        cut: bool = False,
    ) -> Self:
        """Check the rows and collect the labels, unless all are named.

        Raises:
            DataError: a part is empty, there are fewer than two labels, or a label is unknown.
        """
        for part, rows in (("training", train), ("test", test)):
            if not rows:
                raise DataError(f"data set {name!r}: expected {part} rows, got none; check the {part} file")
        if kind != "classification":
            return cls(name, kind, tuple(train), tuple(test), (), published, cut=cut)
        if labels is not None:
            known = tuple(in_order({str(label) for label in labels}))
            check_labels([*train, *test], known, f"data set {name!r}")
            return cls(name, kind, tuple(train), tuple(test), known, published, True, cut)
        known = tuple(in_order({row.target for row in train}))
        if len(known) < 2:
            raise DataError(
                f"data set {name!r}: expected at least 2 labels in the training rows, got only "
                f"{known[0]!r}; check that the label column is the right one"
            )
        check_classes(known, f"data set {name!r}")
        unknown = Counter(row.target for row in test if row.target not in known)
        if unknown:
            label, count = unknown.most_common(1)[0]
            others = f" (and {len(unknown) - 1} more labels)" if len(unknown) > 1 else ""
            raise DataError(
                f"data set {name!r}: the label {label!r} of {count} test rows{others} is in no training "
                f"row; correct it, remove those test rows, or add training rows with it"
            )
        return cls(name, kind, tuple(train), tuple(test), known, published, cut=cut)


def check_labels(rows: Sequence[Row], labels: Sequence[str], where: str) -> None:
    """Raise DataError unless there are two labels or more, and every row has one of them."""
    check_classes(labels, where)
    if len(labels) < 2:
        raise DataError(f"{where}: expected at least 2 labels, got {list(labels)}; name all with data.labels")
    unknown = Counter(row.target for row in rows if row.target not in labels)
    if unknown:
        name, count = unknown.most_common(1)[0]
        raise DataError(
            f"{where}: the label {name!r} of {count} rows is none of the run's {list(labels)}; correct it, "
            "or name all labels with data.labels"
        )


def check_classes(labels: Collection[str], where: str) -> None:
    """Warn of labels that hardly are classes.

    Raises:
        DataError: they are numbers with decimals, which are values to predict.
    """
    decimals = [name for name in labels if DECIMAL.fullmatch(name)]
    integers = [name for name in labels if INTEGER.fullmatch(name)]
    if decimals and len(decimals) + len(integers) == len(labels):
        raise DataError(
            f"{where}: expected labels, got {len(labels)} numbers, {len(decimals)} of them with decimals "
            f"({decimals[0]!r}); {NO_REGRESSION}"
        )
    if len(integers) == len(labels) > MANY:
        warnings.warn(
            f"{where}: {len(labels)} different integers are labels, a class each; name another column if "
            "they are scores, ages or numbers of rows",
            stacklevel=2,
        )
    truths = [name for name in labels if name.casefold() in ("true", "false")]
    if truths and integers:
        warnings.warn(
            f"{where}: truth values ({', '.join(truths)}) and integers ({', '.join(integers):.80}) are "
            "labels side by side, a class each; write them alike if they mean the same",
            stacklevel=2,
        )


def counted(labels: Collection[str]) -> str:
    """How many labels there are, and how many of them are integers, for a line."""
    integers = sum(INTEGER.fullmatch(name) is not None for name in labels)
    if integers == len(labels):
        return f"{integers} integer labels"
    return f"{len(labels)} labels" + (f", {integers} of them integers" if integers else "")


def hold_out(rows: Sequence[Row], kind: Kind, test_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle the rows and cut off a test part: `test_rows` rows, but at most a fifth.

    One row of every label always stays in training, so that no test label is unknown.

    Args:
        rows: all rows.
        kind: of the data set.
        test_rows: how many rows to hold out.
        seed: of the shuffle.

    Returns:
        The training rows and the test rows.
    """
    if test_rows < 1:
        raise ConfigError(f"test_rows: expected at least 1, got {test_rows}")
    order = generator(seed, "split").permutation(len(rows)).tolist()
    first = {rows[i].target: i for i in reversed(order)} if kind == "classification" else {}
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
