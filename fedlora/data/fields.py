"""Which fields of a record make a row: text and label, or prompt and response, and perhaps a client."""

import difflib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedlora.data.dataset import NO_REGRESSION, Kind, Row
from fedlora.errors import ConfigError, DataError

# Columns that usually belong together: a set that is read without the second loses half of its text.
HALVES = {"instruction": ("input", "context"), "sentence1": ("sentence2",), "question1": ("question2",)}
HALVES |= {"premise": ("hypothesis",)}


class ColumnError(DataError):
    """A record or a table lacks a column.

    Args:
        where: file and line.
        role: what the column is to be: text, label, prompt, response or client.
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
    """The columns of a row's three parts; `choose` makes one.

    Args:
        kind: whether the target is a label or free text.
        source: the column of the text, or of the prompt.
        target: the column of the label, or of the response.
        client: the column of the natural client, if any.
        optional: whether rows may lack the column of the client.
    """

    kind: Kind
    source: str
    target: str
    client: str | None
    optional: bool = False

    def within(self, columns: Collection[str]) -> bool:
        """Whether the text and its target have their columns here."""
        return self.source in columns and self.target in columns

    def check(self, columns: Collection[str], where: str) -> None:
        """Refuse a record or a table that lacks a column."""
        roles = ("text", "label") if self.kind == "classification" else ("prompt", "response")
        client = None if self.optional else self.client
        for role, column in zip((*roles, "client"), (self.source, self.target, client), strict=True):
            if column is None or column in columns:
                continue
            raise ColumnError(where, role, column, columns)

    def row(self, record: Mapping[str, object], where: str) -> Row:
        """The row of one record; `where` (file and line) opens the message if it cannot be used."""
        found = record[self.target]
        if self.kind == "classification" and isinstance(found, float):
            raise DataError(
                f"{where}: expected a label in {self.target!r}, got the type float; {NO_REGRESSION}"
            )
        target = _string(found, self.target, where, numbers=True)
        return Row(
            source=_string(record[self.source], self.source, where),
            target=target.strip() if self.kind == "classification" else target,
            client=self._client(record, where),
        )

    def _client(self, record: Mapping[str, object], where: str) -> str | None:
        if self.client is None or (self.optional and self.client not in record):
            return None
        return _string(record[self.client], self.client, where, numbers=True).strip()

    def warn_of_halves(self, columns: Collection[str], where: str) -> None:
        """Warn of a column that usually is the other half of the text, and is not read."""
        for other in HALVES.get(self.source, ()):
            if other in columns and other != self.target:
                warnings.warn(
                    f"{where}: {self.source!r} is read and {other!r} is not, which usually is the other half "
                    "of the text; join both into one column if the model should read both",
                    stacklevel=2,
                )


def choose(text: object, label: object, prompt: object, response: object, client: object) -> Fields:
    """Take exactly one of the pairs text and label, prompt and response.

    A column may be called 1 or true, which YAML takes for a number or a truth value: its name is its text.

    Raises:
        ConfigError: neither pair, half a pair, or more than one pair was given, or several columns for one.
    """
    given = {"text": text, "label": label, "prompt": prompt, "response": response, "client": client}
    names = {role: _column(role, value) for role, value in given.items()}
    source, target, prompt_, response_, holder = names.values()
    came = [role for role, column in names.items() if column and role != "client"]
    if source and target and len(came) == 2:
        return Fields("classification", source, target, holder)
    if prompt_ and response_ and len(came) == 2:
        return Fields("instruction", prompt_, response_, holder)
    raise ConfigError(
        "expected the columns text and label (classification) or prompt and response (instruction), "
        f"got {' and '.join(came) or 'none of them'}; name both columns of one pair"
    )


def as_text(value: object) -> str:
    """A name that YAML or JSON read as a number or a truth value, as the text that it was."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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


def _string(value: object, column: str, where: str, numbers: bool = False) -> str:
    if numbers and isinstance(value, int):  # includes booleans
        return as_text(value)
    if isinstance(value, list):
        turns = all(isinstance(turn, dict) for turn in value)
        came = f"a conversation of {len(value)} turns" if turns else f"a list of {len(value)}"
        raise DataError(
            f"{where}: expected text in {column!r}, got {came}, which is not supported yet; write "
            + ("the prompt and the answer" if turns else "it")
            + " as text, in a column each"
        )
    if not isinstance(value, str):
        wanted = "a string, an integer or a boolean" if numbers else "a string"
        came = "null" if value is None else f"the type {type(value).__name__}"
        raise DataError(f"{where}: expected {wanted} in {column!r}, got {came}; correct or remove the row")
    if not value.strip():
        raise DataError(f"{where}: expected text in {column!r}, got an empty cell; fill or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected Unicode text in {column!r}, got half a surrogate pair; "
            f"correct or remove the row"
        ) from error
    return value
