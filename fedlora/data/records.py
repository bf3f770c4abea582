"""Records of JSONL, CSV and TSV files: what stands where, and one line about what cannot be read."""

import csv
import io
import json
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from fedlora.data.fields import Fields
from fedlora.errors import DataError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
CONVERT = {
    ".parquet": "data=hub data.path=FOLDER reads a folder of Parquet files",
    ".arrow": "data=hub data.path=FOLDER reads a folder of Arrow files",
    ".xlsx": "save it as CSV UTF-8 in the spreadsheet",
    ".xls": "save it as CSV UTF-8 in the spreadsheet",
    ".ods": "save it as CSV UTF-8 in the spreadsheet",
    ".gz": "unpack it with gunzip",
    ".zip": "unpack it",
}
Record = tuple[str, dict[str, object]]  # where it stands, and its columns


def records(path: Path, fields: Fields, quotes: bool | None = None) -> Iterator[Record]:
    """The records of one file that have the columns asked for, each with its file and line.

    Args:
        path: a .jsonl or .json file of one object a line, or a .csv or .tsv file with a header, in UTF-8.
        fields: the columns that there must be.
        quotes: whether quotation marks enclose the cells of a table; None: those of CSV, and not of TSV.

    Raises:
        DataError: what the file is instead.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        came = repr(ending) if ending else "none"
        hint = CONVERT.get(ending, "convert the file")
        raise DataError(f"{path}: expected a file ending in .jsonl, .json, .csv or .tsv, got {came}; {hint}")
    content = _decode(path)
    if ending in (".jsonl", ".json"):
        return _json_records(path, content, fields)
    quoted = ending == ".csv" if quotes is None else quotes
    return _table_records(path, content, "," if ending == ".csv" else "\t", quoted, fields)


def check_there(path: Path) -> None:
    """Raise DataError where there is neither a file nor a folder."""
    if not path.exists():
        raise DataError(f"{path}: expected a data file, got none; check the path")


def _decode(path: Path) -> str:
    check_there(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got {error.strerror}; check the path") from error
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4096]
    try:
        if wide:
            raise UnicodeDecodeError("utf-8", content, 0, 1, "UTF-16, or no text at all")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"the byte 0x{content[error.start]:02x}"
        came, name = ("UTF-16 or no text at all", "UTF-16") if wide else (byte, "CP1252")
        raise DataError(
            f"{path}:{line}: expected UTF-8 text, got {came}; save the file as UTF-8, for example with "
            f"iconv -f {name} -t UTF-8 (Windows and Excel save {name})"
        ) from error


def _json_records(path: Path, content: str, fields: Fields) -> Iterator[Record]:
    before = False  # whether a record was good
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would cut inside strings
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if whole := _whole(content):
                raise DataError(f"{path}: expected one JSON object a line, got {whole}") from error
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise DataError(
                f"{where}: expected one JSON object a line, got broken JSON ({reason}); correct the line"
            ) from error
        if not isinstance(record, dict):
            if whole := _whole(content):
                raise DataError(f"{path}: expected one JSON object a line, got {whole}")
            object_ = ", ".join(f'"{column}": "..."' for column in fields.columns.values())
            raise DataError(
                f"{where}: expected a JSON object, got the JSON {type(record).__name__}; write "
                f"one object a line, such as {{{object_}}}"
            )
        fields.check(record.keys(), where, before)
        before = True
        yield where, record


def _whole(content: str) -> str | None:
    """What a file is that is one JSON value over all its lines, and what to do; None if it is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list):
        return f"one JSON array of {len(found)}; write each a line of its own, for example with jq -c '.[]'"
    if isinstance(found, dict):
        names = ", ".join(map(repr, found))
        return f"one JSON object over many lines, with {names:.200}; write each record as a line of its own"
    return None


def _table_records(
    path: Path, content: str, separator: str, quoted: bool, fields: Fields
) -> Iterator[Record]:
    table = io.StringIO(content, newline="")
    if quoted:
        reader = csv.reader(table, delimiter=separator, strict=True)
    else:
        reader = csv.reader(table, delimiter=separator, quoting=csv.QUOTE_NONE, strict=True)
    lines = re.split("\r\n|\r|\n", content) if quoted else []
    header: list[str] = []
    rows = before = 0
    several: list[tuple[int, int]] = []  # first and last line of rows of several lines
    targets: set[object] = set()
    marks = whole = 0
    try:
        for cells in reader:
            where, first, before = f"{path}:{reader.line_num}", before + 1, reader.line_num
            if not cells:  # a blank line
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(header, separator, where, fields)
                continue
            if len(cells) < len(header):
                lacking = ", ".join(map(repr, header[len(cells) :]))
                raise DataError(
                    f"{where}: expected {len(header)} cells as in the header, got {len(cells)} and none for "
                    f"{lacking}; write the missing ones (an empty cell keeps its {separator!r}), or remove "
                    "the row"
                )
            if len(cells) > len(header):
                advice = (
                    "put quotes around a cell that holds a separator or a line break"
                    if quoted
                    else "say data.quotes=true if quotes enclose cells that hold a separator or a line break"
                )
                raise DataError(
                    f"{where}: expected {len(header)} cells as in the header, got {len(cells)}; {advice}"
                )
            rows += 1
            record: dict[str, object] = dict(zip(header, cells, strict=True))
            targets.add(record[fields.target])
            if quoted and before > first:
                several.append((first, before))
            if not quoted:
                with_quotes = [cell for cell in cells if '"' in cell]
                marks += len(with_quotes)
                whole += sum(re.fullmatch(r'"(?:[^"]|"")*"', cell) is not None for cell in with_quotes)
            yield where, record
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: expected a row of cells, got broken quoting or an endless cell "
            f'({error}); double each " inside a quoted cell, say data.quotes=false if quotes are part of the '
            "text, or use JSONL"
        ) from error
    at = header.index(fields.target) if header else 0
    if at:  # counted from the right, since separators in a quoted text move it
        at -= len(header)
    doubtful = [
        (first, last)
        for first, last in several
        if _like_rows(
            [line.split(separator) for line in lines[first - 1 : last]], len(header), at, fields, targets
        )
    ]
    if doubtful:
        begin, end = doubtful[0]
        warnings.warn(
            f"{path}: {before} lines made {rows} rows; {len(doubtful)} rows span lines that look like rows "
            f"of their own (lines {begin} to {end}); say data.quotes=false if quotes are part of the text",
            stacklevel=2,
        )
    if marks and marks == whole:
        warnings.warn(
            f"{path}: quotes are read as part of the text, and all {marks} cells with quotes are enclosed in "
            "them; say data.quotes=true if they only enclose the cells",
            stacklevel=2,
        )


def _like_rows(
    found: list[list[str]], columns: int, at: int, fields: Fields, targets: Collection[object]
) -> bool:
    """Whether all lines of a row that spans several could be rows: with enough cells, and known labels.

    Of free text, such as responses, only the number of cells can tell.
    """
    if not all(len(cells) >= columns > 1 for cells in found):
        return False
    if not fields.task.labelled:
        return len(found) > 2
    return all(cells[at].strip('"') in targets for cells in found)


def _check_header(header: list[str], separator: str, where: str, fields: Fields) -> None:
    """Refuse a header without the columns asked for, and say so where it only has another separator."""
    if re.fullmatch(r"sep=.?", header[0]):
        raise DataError(
            f"{where}: expected the header, got a spreadsheet's own line {header[0]!r}; remove this line and "
            f"save the cells separated by {separator!r}"
        )
    if len(header) == 1:
        for other in ";\t|,":
            if other != separator and fields.within([cell.strip(' "') for cell in header[0].split(other)]):
                raise DataError(
                    f"{where}: expected cells separated by {separator!r}, got a header with {other!r}; save "
                    f"the file with {separator!r}" + (", or name it .tsv" if other == "\t" else "")
                )
    fields.check(header, where)
    if len(set(header)) < len(header):
        raise DataError(f"{where}: expected each column once, got {header}; rename one")


def columns_of(path: Path) -> list[str]:
    """The columns of a file, or of the first file of a folder.

    Raises:
        DataError: there is no file that could be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        if not files:
            raise DataError(f"{path}: expected files ending in {', '.join(sorted(ENDINGS))}, got none")
        path = files[0]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                return next(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","), [])
            first = next((line for line in file if line.strip()), "{}")
            try:
                found = json.loads(first)
            except ValueError:
                found = None
            if not isinstance(found, dict) and (whole := _whole(first + file.read())):
                raise DataError(f"{path}: expected one JSON object a line, got {whole}")
            found = json.loads(first)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return list(found) if isinstance(found, dict) else []
