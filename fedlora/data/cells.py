"""The text of one cell of a record, or one line about why it cannot be used."""

from collections.abc import Mapping

from fedlora.errors import DataError


def as_text(value: object) -> str:
    """A name that YAML or JSON read as a number or a truth value, as the text that it was."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def text_in(record: Mapping[str, object], column: str, where: str, numbers: bool = False) -> str:
    """The text of a record's cell.

    Args:
        record: the record, by column.
        column: the column, which the record has.
        where: file and line, which open the message.
        numbers: whether integers and truth values are taken too, as the text that they were.

    Raises:
        DataError: the cell is empty, or holds something else.
    """
    value = record[column]
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
