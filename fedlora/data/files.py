"""Data sets from local files: JSONL, CSV or TSV, in UTF-8.

A folder stands for the files in it, each of them one natural client named by its stem. A held-out test part
is cut from the training rows when there are no test files.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.data.dataset import Dataset, Row, hold_out
from fedlora.data.fields import Fields, choose
from fedlora.errors import ConfigError, DataError
from fedlora.order import in_order, natural

ENDINGS = (".jsonl", ".json", ".csv", ".tsv")


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
        client: the column that names a row's natural client, if there is one; none with a folder.
        test_rows: how many rows to hold out of the training rows, at most a fifth of them.
        seed: which rows.
    """
    fields = choose(text, label, prompt, response, client)
    path = Path(train)
    rows = _gather(path, fields)
    if test is None:
        kept, held = hold_out(rows, fields.kind, test_rows, seed)
    else:
        kept, held = rows, _gather(Path(test), fields)
    return Dataset.build(path.stem, fields.kind, kept, held)


def held_out(
    test: str | Path,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    labels: Sequence[str] | None = None,
) -> Dataset:
    """Read the server's part of a data set whose training rows are at other sites: its test rows.

    Args:
        test: a file or a folder as `load` takes them.
        text: the column of the text to classify.
        label: the column of its label.
        prompt: the column of the prompt.
        response: the column of the response.
        labels: all labels that sites may have; None takes those of the test rows.
    """
    fields = choose(text, label, prompt, response, None)
    rows = _gather(Path(test), fields)
    if fields.kind == "instruction":
        return Dataset(Path(test).stem, fields.kind, (), tuple(rows), ())
    known = tuple(
        in_order({row.target for row in rows} if labels is None else {str(name) for name in labels})
    )
    check_labels(rows, known, str(test))
    return Dataset(Path(test).stem, fields.kind, (), tuple(rows), known)


def rows_of(
    path: str | Path,
    text: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    labels: Sequence[str] = (),
) -> list[Row]:
    """Read one site's own rows, by its own names of the columns.

    Args:
        path: a file as `load` takes it.
        text: the column of the text to classify.
        label: the column of its label.
        prompt: the column of the prompt.
        response: the column of the response.
        labels: those of the run.
    """
    fields = choose(text, label, prompt, response, None)
    rows = _read(Path(path), fields)
    if fields.kind == "classification":
        check_labels(rows, labels, str(path))
    return rows


def check_labels(rows: Sequence[Row], labels: Sequence[str], where: str) -> None:
    """Raise DataError unless there are two labels or more, and every row has one of them."""
    if len(labels) < 2:
        raise DataError(f"{where}: expected at least 2 labels, got {list(labels)}; name all with data.labels")
    unknown = Counter(row.target for row in rows if row.target not in labels)
    if unknown:
        name, count = unknown.most_common(1)[0]
        raise DataError(
            f"{where}: the label {name!r} of {count} rows is none of the run's {list(labels)}; correct it, "
            "or name all labels with data.labels"
        )


def _gather(path: Path, fields: Fields) -> list[Row]:
    """The rows of a file; or of the files of a folder in the order of their names, as clients."""
    if not path.is_dir():
        return _read(path, fields)
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
    return [replace(row, client=name) for name, file in found.items() for row in _read(file, fields)]


def _read(path: Path, fields: Fields) -> list[Row]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        came = repr(ending) if ending else "none"
        raise DataError(
            f"{path}: expected a file ending in .jsonl, .json, .csv or .tsv, got {came}; convert the file"
        )
    content = _decode(path)
    if ending in (".csv", ".tsv"):
        rows = list(_csv_rows(path, content, "," if ending == ".csv" else "\t", fields))
    else:
        rows = list(_json_rows(path, content, fields))
    if not rows:
        raise DataError(f"{path}: expected one row or more, got an empty file; check the path")
    return rows


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a data file, got none; check the path") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror}; check the path") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: expected UTF-8 text, got the byte 0x{content[error.start]:02x}; "
            f"save the file as UTF-8 (for example with iconv)"
        ) from error


def _json_rows(path: Path, content: str, fields: Fields) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would cut inside strings
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise DataError(
                f"{where}: expected one JSON object a line, got broken JSON ({reason}); correct the line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: expected a JSON object, got the JSON {type(record).__name__}; write "
                f'one object a line, such as {{"{fields.source}": "...", "{fields.target}": "..."}}'
            )
        yield fields.row(record, where)


def _csv_rows(path: Path, content: str, delimiter: str, fields: Fields) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells:  # a blank line
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                fields.check(header, where)
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: expected each column once, got {header}; rename one")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: expected {len(header)} cells as in the header, got {len(cells)}; "
                    f"put quotes around a cell that holds a separator or a line break"
                )
            yield fields.row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: expected a row of cells, got broken quoting or an endless cell "
            f'({error}); double each " inside a quoted cell, or use JSONL'
        ) from error
