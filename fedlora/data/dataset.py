"""Rows of text with their targets, and the data set that a run trains and tests on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from fedlora.errors import ConfigError, DataError
from fedlora.order import in_order
from fedlora.seeds import generator

Kind = Literal["classification", "instruction"]


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
        labels: those of the training rows in the order of the model's outputs, which is that of
            `fedlora.order.in_order` (integers by value); empty for instructions.
    """

    name: str
    kind: Kind
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]

    @classmethod
    def build(cls, name: str, kind: Kind, train: Sequence[Row], test: Sequence[Row]) -> Self:
        """Check the rows and collect the labels.

        Raises:
            DataError: a part is empty, there are fewer than two labels, or a test label is unknown.
        """
        for part, rows in (("training", train), ("test", test)):
            if not rows:
                raise DataError(f"data set {name!r}: expected {part} rows, got none; check the {part} file")
        labels = tuple(in_order({row.target for row in train})) if kind == "classification" else ()
        if kind == "classification":
            if len(labels) < 2:
                raise DataError(
                    f"data set {name!r}: expected at least 2 labels in the training rows, got only "
                    f"{labels[0]!r}; check that the label column is the right one"
                )
            unknown = Counter(row.target for row in test if row.target not in labels)
            if unknown:
                label, count = unknown.most_common(1)[0]
                others = f" (and {len(unknown) - 1} more labels)" if len(unknown) > 1 else ""
                raise DataError(
                    f"data set {name!r}: the label {label!r} of {count} test rows{others} is in no training "
                    f"row; correct it, remove those test rows, or add training rows with it"
                )
        return cls(name, kind, tuple(train), tuple(test), labels)


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
        labels = f" with {len(first)} labels" if first else ""
        raise DataError(
            f"no test row can be held out of {len(rows)} rows{labels}: at most a fifth is held out and one "
            f"row of each label stays; add rows or give test rows of their own"
        )
    testing = set(held)
    return [rows[i] for i in order if i not in testing], [rows[i] for i in held]
