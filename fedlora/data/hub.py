"""Data sets from the Hugging Face hub, or from a local folder that the `datasets` library can load."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlora.data.cells import as_text
from fedlora.data.dataset import Dataset, Row, hold_out
from fedlora.data.fields import Fields, choose
from fedlora.errors import DataError
from fedlora.tasks import LearningTask


def load(
    path: str,
    name: str | None = None,
    split: str = "train",
    test_split: str | None = "test",
    client: str | None = None,
    test_rows: int = 500,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    task: LearningTask | str | None = None,
    **columns: str | None,
) -> Dataset:
    """Load a data set, such as one of texts and labels or one of prompts and responses.

    Args:
        path: a hub name such as "SetFit/sst2", or a local folder.
        name: the configuration, for a data set that has several.
        split: the training split.
        test_split: the test split, used whole; None holds out a part of the training split.
        client: the column that names a row's natural client, if there is one.
        test_rows: how many rows to hold out when there is no test split, at most a fifth.
        seed: which rows.
        labels: all labels that there may be; None takes those of the training rows.
        task: what is learnt; None takes the task whose columns are named.
        columns: the column of each role of the task: `text` and `label`, or `prompt` and `response`. Class
            numbers become their names.
    """
    fields = choose(columns, client, task)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            'expected the datasets library for data from the hub, got none; pip install "fedlora[hub]"'
        ) from error
    try:
        tables: dict[str, Any] = datasets.load_dataset(path, name)
    except Exception as error:  # the library raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"hub data set {path!r}: expected a data set on the hub or a local folder, got {reason:.300}; "
            f"check the name, the configuration (name=) and the connection, or use data=files"
        ) from error
    rows = _rows(tables, split, fields, path)
    if test_split is None:
        kept, held = hold_out(rows, fields.task, test_rows, seed)
    else:
        kept, held = rows, _rows(tables, test_split, replace(fields, optional=True), path)
    known = None if labels is None else [as_text(name) for name in labels]
    return Dataset.build(path, fields.task, kept, held, known, cut=test_split is None)


def _rows(tables: dict[str, Any], split: str, fields: Fields, path: str) -> list[Row]:
    if split not in tables:
        raise DataError(
            f"hub data set {path!r}: expected a split {split!r}, got {', '.join(map(repr, tables))}; "
            f"set split= or test_split= to one of these, or test_split=null to hold out training rows"
        )
    where = f"hub data set {path!r}, split {split!r}"
    table = tables[split]
    fields.check(table.column_names, where)
    fields.warn_of_halves(table.column_names, where)
    asked = (*fields.columns.values(), fields.client)
    columns = [column for column in asked if column and column in table.column_names]
    names = {c: table.features[c].names for c in columns if hasattr(table.features[c], "names")}
    rows = []
    for number, record in enumerate(table.select_columns(columns)):
        place = f"{where}, row {number}"
        for column, known in names.items():
            value = record[column]
            if value is None or not 0 <= value < len(known):
                raise DataError(
                    f"{place}: expected a class number below {len(known)} in {column!r}, got {value}; "
                    f"take a split that is labelled, or test_split=null to hold out training rows"
                )
            record[column] = known[value]
        rows.append(fields.row(record, place))
    return rows
