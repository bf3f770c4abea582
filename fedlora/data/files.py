"""Data sets from local files: JSONL, CSV or TSV, in UTF-8.

A folder stands for the files in it, each of them one natural client named by its stem. A held-out test part
is cut from the training rows when there are no test files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.core.natural_order import natural
from fedlora.data.cells import as_text
from fedlora.data.dataset import Dataset, Row, hold_out
from fedlora.data.fields import Fields, choose
from fedlora.data.records import ENDINGS, check_there, records
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import LearningTask


def load(
    train: str | Path,
    test: str | Path | None = None,
    client: str | None = None,
    test_rows: int = 500,
    seed: int = 0,
    quotes: bool | None = None,
    labels: Sequence[str] | None = None,
    task: LearningTask | str | None = None,
    **columns: str | None,
) -> Dataset:
    """Read a data set, such as one of texts and labels or one of prompts and responses.

    Args:
        train: a .jsonl or .json file (one object a line), a .csv or .tsv file with a header, or a folder of
            such files, a natural client each.
        test: the test file or folder, used whole; without it a part of the training rows is held out.
        client: the column that names a row's natural client, if there is one; none with a folder. Test rows
            may lack it.
        test_rows: how many rows to hold out of the training rows, at most a fifth of them.
        seed: which rows.
        quotes: whether quotation marks enclose the cells of a table; None: those of CSV, and not of TSV.
        labels: all labels that there may be; None takes those of the training rows.
        task: what is learnt; None takes the task whose columns are named.
        columns: the column of each role of the task: `text` and `label`, or `prompt` and `response`.
    """
    path = Path(train)
    check_there(path)  # before the columns, which a wrong path makes no better
    if test is not None:
        check_there(Path(test))
    fields = choose(columns, client, task)
    rows = _gather(path, fields, quotes)
    if test is None:
        kept, held = hold_out(rows, fields.task, test_rows, seed)
    else:
        kept, held = rows, _gather(Path(test), replace(fields, optional=True), quotes)
    known = None if labels is None else [as_text(name) for name in labels]
    return Dataset.build(path.stem, fields.task, kept, held, known, cut=test is None)


def held_out(
    test: str | Path,
    labels: Sequence[str] | None = None,
    quotes: bool | None = None,
    task: LearningTask | str | None = None,
    **columns: str | None,
) -> Dataset:
    """Read the server's part of a data set whose training rows are at other sites: its test rows.

    Args:
        test: a file or a folder as `load` takes them.
        labels: all labels that sites may have; None takes those of the test rows.
        quotes: as in `load`.
        task: as in `load`.
        columns: as in `load`.
    """
    check_there(Path(test))
    fields = choose(columns, None, task)
    rows = _gather(Path(test), fields, quotes)
    declared = None if labels is None else [as_text(name) for name in labels]
    known = fields.task.labels((), rows, declared, str(test))
    named = labels is not None and bool(known)
    return Dataset(Path(test).stem, fields.task, (), tuple(rows), known, declared=named)


def rows_of(
    path: str | Path,
    labels: Sequence[str] = (),
    quotes: bool | None = None,
    task: LearningTask | str | None = None,
    **columns: str | None,
) -> list[Row]:
    """Read one site's own rows, by its own names of the columns.

    Args:
        path: a file as `load` takes it.
        labels: those of the run.
        quotes: as in `load`.
        task: as in `load`.
        columns: as in `load`.
    """
    fields = choose(columns, None, task)
    rows = _read(Path(path), fields, quotes)
    fields.task.check_rows(rows, labels, str(path))
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
