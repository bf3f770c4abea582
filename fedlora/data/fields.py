"""Which fields of a record make a row: text and label, or prompt and response, and perhaps a client."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedlora.data.dataset import Kind, Row
from fedlora.errors import ConfigError, DataError


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
    """The columns of a row's three parts; `choose` makes one."""

    kind: Kind
    source: str
    target: str
    client: str | None

    def check(self, columns: Collection[str], where: str) -> None:
        """Refuse a record or a table that lacks a column."""
        roles = ("text", "label") if self.kind == "classification" else ("prompt", "response")
        for role, column in zip((*roles, "client"), (self.source, self.target, self.client), strict=True):
            if column is None or column in columns:
                continue
            raise ColumnError(where, role, column, columns)

    def row(self, record: Mapping[str, object], where: str) -> Row:
        """The row of one record; `where` (file and line) opens the message if it cannot be used."""
        self.check(record.keys(), where)
        target = _string(record[self.target], self.target, where, numbers=True)
        return Row(
            source=_string(record[self.source], self.source, where),
            target=target.strip() if self.kind == "classification" else target,
            client=self.client and _string(record[self.client], self.client, where, numbers=True).strip(),
        )


def choose(
    text: str | None, label: str | None, prompt: str | None, response: str | None, client: str | None
) -> Fields:
    """Take exactly one of the pairs text and label, prompt and response.

    Raises:
        ConfigError: neither pair, half a pair, or more than one pair was given.
    """
    given = {"text": text, "label": label, "prompt": prompt, "response": response}
    came = [role for role, column in given.items() if column]
    if text and label and len(came) == 2:
        return Fields("classification", text, label, client)
    if prompt and response and len(came) == 2:
        return Fields("instruction", prompt, response, client)
    raise ConfigError(
        "expected the columns text and label (classification) or prompt and response (instruction), "
        f"got {' and '.join(came) or 'none of them'}; name both columns of one pair"
    )


def _string(value: object, column: str, where: str, numbers: bool = False) -> str:
    if numbers and isinstance(value, int):  # includes booleans
        return str(value)
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
