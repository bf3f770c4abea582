"""Labels that rows have, and those that hardly are labels."""

import re
import warnings
from collections.abc import Collection

from fedlora.core.natural_order import INTEGER
from fedlora.errors import DataError

DECIMAL = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+)")
MANY = 50  # integers that are classes are seldom more
NO_REGRESSION = (
    "regression is not available yet; if the numbers are classes, write them as whole numbers or words"
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
