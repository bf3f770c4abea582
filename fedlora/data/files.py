"""Data sets from local files: JSONL, CSV or TSV, in UTF-8.

A folder stands for the files in it, each of them one natural client named by its stem. A held-out test part
is cut from the training rows when there are no test files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.core.natural_order import in_order, natural
from fedlora.data.dataset import Dataset, Row, check_labels, hold_out
from fedlora.data.fields import Fields, as_text, choose
from fedlora.data.records import ENDINGS, records
from fedlora.errors import ConfigError, DataError


def load(
    train: str | Path,
    test: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    client: str | None = None,
    test_rows: int = 500,
    seed: int = 0,
    quotes: bool | None = None,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Read a classification (text, label) or an instruction (prompt, response) data set.

    Args:
        train: a .jsonl or .json file (one object a line), a .csv or .tsv file with a header, or a folder of
            such files, a natural client each.
        test: the test file or folder, used whole; without it a part of the training rows is held out.
        text: the column of the text to classify.
        label: the column of its label.
        prompt: the column of the prompt.
        response: the column of the response.
        client: the column that names a row's natural client, if there is one; none with a folder. Test rows
            may lack it.
        test_rows: how many rows to hold out of the training rows, at most a fifth of them.
        seed: which rows.
        quotes: whether quotation marks enclose the cells of a table; None: those of CSV, and not of TSV.
        labels: all labels that there may be; None takes those of the training rows.
    """
    fields = choose(text, label, prompt, response, client)
    path = Path(train)
    rows = _gather(path, fields, quotes)
    if test is None:
        kept, held = hold_out(rows, fields.kind, test_rows, seed)
    else:
        kept, held = rows, _gather(Path(test), replace(fields, optional=True), quotes)
    known = None if labels is None else [as_text(name) for name in labels]
    return Dataset.build(path.stem, fields.kind, kept, held, known, cut=test is None)


def held_out(
    test: str | Path,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    labels: Sequence[str] | None = None,
    quotes: bool | None = None,
) -> Dataset:
    """Read the server's part of a data set whose training rows are at other sites: its test rows.

    Args:
        test: a file or a folder as `load` takes them.
        text: the column of the text to classify.
        label: the column of its label.
        prompt: the column of the prompt.
        response: the column of the response.
        labels: all labels that sites may have; None takes those of the test rows.
        quotes: as in `load`.
    """
    fields = choose(text, label, prompt, response, None)
    rows = _gather(Path(test), fields, quotes)
    if fields.kind == "instruction":
        return Dataset(Path(test).stem, fields.kind, (), tuple(rows), ())
    known = tuple(
        in_order({row.target for row in rows} if labels is None else {as_text(name) for name in labels})
    )
    check_labels(rows, known, str(test))
    return Dataset(Path(test).stem, fields.kind, (), tuple(rows), known, declared=labels is not None)


def rows_of(
    path: str | Path,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    labels: Sequence[str] = (),
    quotes: bool | None = None,
) -> list[Row]:
    """Read one site's own rows, by its own names of the columns.

    Args:
        path: a file as `load` takes it.
        text: the column of the text to classify.
        label: the column of its label.
        prompt: the column of the prompt.
        response: the column of the response.
        labels: those of the run.
        quotes: as in `load`.
    """
    fields = choose(text, label, prompt, response, None)
    rows = _read(Path(path), fields, quotes)
    if fields.kind == "classification":
        check_labels(rows, labels, str(path))
    return rows


def _gather(path: Path, fields: Fields, quotes: bool | None) -> list[Row]:
    """The rows of a file; or of the files of a folder in the order of their names, as clients."""
    if not path.is_dir():
        return _read(path, fields, quotes)
    if fields.client:
        raise ConfigError(
            f"{path}: expected a file, since client names the column {fields.client!r}; got a folder, whose "
            f"files are the clients; leave client out, or give one file"
        )
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir(), key=lambda file: natural(file.name)):
        if file.suffix.lower() not in ENDINGS or file.name.startswith("."):
            continue
        if file.stem in found:
            raise DataError(
                f"{path}: expected one file for each client, got {found[file.stem].name} and {file.name} for "
                f"{file.stem!r}; join or rename them"
            )
        found[file.stem] = file
    if not found:
        raise DataError(
            f"{path}: expected files ending in .jsonl, .json, .csv or .tsv, a client each, got none; "
            f"check the path"
        )
    return [replace(row, client=name) for name, file in found.items() for row in _read(file, fields, quotes)]


def _read(path: Path, fields: Fields, quotes: bool | None = None) -> list[Row]:
    found = list(records(path, fields, quotes))
    if not found:
        raise DataError(f"{path}: expected one row or more, got an empty file; check the path")
    fields.warn_of_halves(found[0][1].keys(), str(path))
    return [fields.row(record, where) for where, record in found]
