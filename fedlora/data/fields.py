"""Which columns of a record make a row: those that its learning task needs, and perhaps a client's."""

import difflib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fedlora.data.cells import as_text, text_in
from fedlora.data.dataset import Row
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import TASKS, LearningTask, learning_task, task_of_columns

# Columns that usually belong together: a set that is read without the second loses half of its text.
HALVES = {"instruction": ("input", "context"), "sentence1": ("sentence2",), "question1": ("question2",)}
HALVES |= {"premise": ("hypothesis",)}


class ColumnError(DataError):
    """A record or a table lacks a column.

    Args:
        where: file and line.
        role: what the column is to be, such as text, label, prompt, response or client.
        column: its name, which is not there.
        columns: the names that are there.
        key: how a user sets it, with {role} and {column} in it.
    """

    def __init__(
        self,
        where: str,
        role: str,
        column: str,
        columns: Collection[str],
        key: str = "data.{role}={column}",
    ) -> None:
        near = difflib.get_close_matches(column, columns, n=1)
        said = key.format(role=role, column=near[0] if near else "")
        hint = f"did you mean {said}?" if near else f"set {said} to the right one"
        super().__init__(
            f"{where}: expected a column {column!r}, got {', '.join(map(repr, columns))}; {hint}"
        )
        self.where, self.role, self.column, self.columns = where, role, column, columns

    def at_a_site(self) -> "ColumnError":
        """The same for the operator of a site, whose node.toml names its columns."""
        return ColumnError(
            self.where, self.role, self.column, self.columns, '{role} = "{column}" in node.toml'
        )


@dataclass(frozen=True)
class Fields:
    """The columns of a row's parts; `choose` makes one.

    Args:
        task: what is learnt from the rows.
        columns: the column of each of the task's roles, in the task's order.
        client: the column of the natural client, if any.
        optional: whether rows may lack the column of the client.
    """

    task: LearningTask
    columns: Mapping[str, str]
    client: str | None
    optional: bool = False

    @property
    def source(self) -> str:
        """The column that the model reads first."""
        return next(iter(self.columns.values()))

    @property
    def target(self) -> str:
        """The column of the target, the last one."""
        return [*self.columns.values()][-1]

    def within(self, there: Collection[str]) -> bool:
        """Whether all parts but the client have their columns here."""
        return {*self.columns.values()} <= {*there}

    def check(self, there: Collection[str], where: str, before: bool = False) -> None:
        """Refuse a record or a table that lacks a column.

        Args:
            there: the names of all its columns.
            where: file and line, which open the message.
            before: whether records before this one have them all, so that this one is to be corrected.

        Raises:
            ColumnError: the first record or the table lacks a column, which may have another name.
            DataError: a later record lacks one.
        """
        client = {} if self.optional or self.client is None else {"client": self.client}
        for role, column in {**self.columns, **client}.items():
            if column in there:
                continue
            if not before:
                raise ColumnError(where, role, column, there)
            near = difflib.get_close_matches(column, there, n=1)
            hint = f"rename {near[0]!r} in this row" if near else "add it to this row"
            raise DataError(
                f"{where}: expected the key {column!r}, which the rows before have, got "
                f"{', '.join(map(repr, there))}; {hint}, or remove the row"
            )

    def row(self, record: Mapping[str, object], where: str) -> Row:
        """The row of one record; `where` (file and line) opens the message if it cannot be used."""
        row = self.task.row(record, self.columns, where)
        if self.client is None or (self.optional and self.client not in record):
            return row
        return replace(row, client=text_in(record, self.client, where, numbers=True).strip())

    def warn_of_halves(self, there: Collection[str], where: str) -> None:
        """Warn of a column that usually is the other half of the text, and is not read."""
        for other in HALVES.get(self.source, ()):
            if other in there and other not in self.columns.values():
                warnings.warn(
                    f"{where}: {self.source!r} is read and {other!r} is not, which usually is the other half "
                    "of the text; join both into one column if the model should read both",
                    stacklevel=2,
                )


def choose(
    columns: Mapping[str, object], client: object = None, task: LearningTask | str | None = None
) -> Fields:
    """Take the columns of one task: text and label, or prompt and response.

    A column may be called 1 or true, which YAML takes for a number or a truth value: its name is its text.

    Args:
        columns: the column of each role; None where there is none.
        client: the column of the natural client, if any.
        task: what is learnt; None takes the task of fedlora whose roles are those that have a column.

    Raises:
        ConfigError: a role has no column or several, or there are columns for other roles.
    """
    names = {role: column for role, value in columns.items() if (column := _column(role, value))}
    holder = _column("client", client)
    found = task_of_columns(names) if task is None else learning_task(task)
    came = " and ".join(names) or "none of them"
    if found is None and (known := next((t for t in TASKS if names and {*names} < {*t.columns}), None)):
        lacking = next(role for role in known.columns if role not in names)
        beside = " and ".join(f"data.{role}={name}" for role, name in names.items())
        raise ConfigError(
            f"data.{lacking}: expected the column of the {lacking} beside {beside}, got none; say "
            f"data.{lacking}=COLUMN too"
        )
    if found is None:
        pairs = (f"{' and '.join(known.columns)} ({known.name})" for known in TASKS)
        raise ConfigError(
            f"expected the columns {' or '.join(pairs)}, got {came}; name both columns of one pair"
        )
    if {*found.columns} != {*names}:
        wanted = " and ".join(found.columns)
        raise ConfigError(
            f"task {found.name}: expected the columns {wanted}, got {came}; name each of them, and no other"
        )
    return Fields(found, {role: names[role] for role in found.columns}, holder)


def find(
    columns: Mapping[str, object],
    there: Collection[str],
    client: object = None,
    task: LearningTask | str | None = None,
) -> Fields | None:
    """The columns of one task: those that are named, or else those that are called like its roles.

    Args:
        columns: the column of each role that is named; None where there is none.
        there: the names of all columns.
        client: as in `choose`.
        task: what is learnt; None takes the first task of fedlora whose columns are there.

    Returns:
        The columns; None where none are named, and those of no task are there.

    Raises:
        ConfigError: as in `choose`.
    """
    named = {role: column for role, column in columns.items() if column is not None}
    if task is None and not named:
        task = next((known for known in TASKS if {*known.columns} <= {*there}), None)
        if task is None:
            return None
    if task is not None:
        named = {role: role for role in learning_task(task).columns} | named
    return choose(named, client, task)


def _column(role: str, value: object) -> str | None:
    """The name of one column."""
    if value is None or isinstance(value, str | int | float):
        return None if value is None else as_text(value)
    try:
        several = [as_text(name) for name in value]  # type: ignore[attr-defined]
    except TypeError:
        several = [as_text(value)]
    raise ConfigError(
        f"data.{role}: expected the name of one column, got {len(several)} ({', '.join(several)}); join them "
        "into one column of the file, and name that"
    )
