"""Rows as a caller has them in memory, made into a data set."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.data import Dataset, Row
from fedlora.data.cells import as_text
from fedlora.data.dataset import hold_out
from fedlora.data.fields import Fields, find
from fedlora.errors import DataError
from fedlora.tasks import TASKS, LearningTask


@dataclass(frozen=True)
class Columns:
    """Which keys of a record are what, for which learning task.

    Args:
        named: role -> key, such as text, label, prompt or response; None finds those called like the roles.
        client: the key that names a row's natural client.
        task: what is learnt; None takes the task whose keys are named, or there.
    """

    named: Mapping[str, str | None] = field(default_factory=dict)
    client: str | None = None
    task: LearningTask | str | None = None

    def fields(self, there: Collection[str], where: str) -> Fields:
        """The columns of a table or a record with these keys.

        Raises:
            ConfigError: a key is named for a role that the task does not have, or a role has no key.
            DataError: nothing is named, and the keys of no task are there.
        """
        found = find(self.named, there, self.client, self.task)
        if found is None:
            pairs = ", or ".join(" and ".join(task.columns) for task in TASKS)
            raise DataError(
                f"{where} {pairs}, got {', '.join(map(str, there))}; name others with text= and label=, or "
                "prompt= and response="
            )
        return found


def records_of(data: Any) -> list[Mapping[str, Any]]:
    """A list of dicts, a frame of pandas or a set of the datasets library, as records.

    Raises:
        DataError: something else.
    """
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return list(data.astype(object).where(data.notna(), None).to_dict("records"))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        found = list(data)
        if all(isinstance(record, Mapping) for record in found):
            return [_classes_named(record, data) for record in found]
    raise DataError(
        f"data: expected a preset, a path, a list of dicts, a frame, a set of the datasets library or "
        f"{{client: rows}}, got {type(data).__name__}"
    )


def _classes_named(record: Mapping[str, Any], data: Any) -> Mapping[str, Any]:
    """A record of the datasets library with the names of its classes for their numbers; None for no class."""
    features = getattr(data, "features", None) or {}
    named = {key: feature.names for key, feature in features.items() if hasattr(feature, "names")}
    if not named:
        return record
    numbers = {key: record[key] for key in named}
    known = {
        key: named[key][n] if n is not None and 0 <= n < len(named[key]) else None
        for key, n in numbers.items()
    }
    return {**record, **known}


def rows_of(data: Any, columns: Columns, where: str = "data") -> tuple[list[Row], Fields]:
    """The rows of records, and what their columns are.

    Raises:
        DataError: no record, or one that cannot be used; names its number.
    """
    if isinstance(data, Mapping) and not hasattr(data, "columns"):
        if columns.client is not None:
            raise DataError("data: expected rows without client=, since the keys of the mapping are clients")
        parts = {str(name): rows_of(rows, columns, f"{where}[{name!r}]") for name, rows in data.items()}
        if not parts:
            raise DataError("data: expected at least one client, got an empty mapping")
        named = [replace(row, client=name) for name, (rows, _) in parts.items() for row in rows]
        return named, next(iter(parts.values()))[1]
    records = records_of(data)
    if not records:
        raise DataError(f"{where}: expected one row or more, got none")
    fields = columns.fields(records[0].keys(), "data: expected rows with the keys")
    fields.warn_of_halves(records[0].keys(), where)
    rows = []
    for number, record in enumerate(records):
        fields.check(record.keys(), f"{where}[{number}]", before=number > 0)
        rows.append(fields.row(record, f"{where}[{number}]"))
    return rows, fields


def dataset(
    data: Any,
    test: Any,
    columns: Columns,
    labels: Sequence[str] | None,
    test_rows: int,
    seed: int,
    name: str = "rows",
) -> Dataset:
    """A data set of rows in memory.

    Args:
        data: training rows: a list of dicts, a frame, a set of the datasets library, or {client: rows}.
        test: likewise the test rows; None holds a part of the training rows out.
        columns: which keys are what.
        labels: all labels that there may be; None takes those of the training rows.
        test_rows: how many rows to hold out, at most a fifth.
        seed: which rows.
        name: of the set.

    Raises:
        DataError: rows that cannot be used.
    """
    rows, fields = rows_of(data, columns)
    if test is None:
        kept, held = hold_out(rows, fields.task, test_rows, seed)
    else:
        kept, (held, _) = rows, rows_of(test, replace(columns, client=None), "test")
    known = None if labels is None else [as_text(label) for label in labels]
    return Dataset.build(name, fields.task, kept, held, known, cut=test is None)
