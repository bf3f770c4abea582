import csv
import json
from pathlib import Path

import pytest

from fedlora.data import partition
from fedlora.data.dataset import Row
from fedlora.data.files import held_out, load, rows_of
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import Instruction

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2], "site": f"s{i % 3}"} for i in range(20)]


def jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", "utf-8")
    return path


def table(path: Path, rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def message(path: Path, content: str | bytes, **columns: str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load(path, **(columns or {"text": "text", "label": "label"}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_csv_and_tsv_give_the_same_rows(tmp_path: Path) -> None:
    cells = [["site", "label", "text"], *([str(r["site"]), str(r["label"]), str(r["text"])] for r in ROWS)]
    paths = [
        jsonl(tmp_path / "a.jsonl", ROWS),
        jsonl(tmp_path / "a.json", ROWS),
        table(tmp_path / "a.csv", cells),
        table(tmp_path / "a.TSV", cells, "\t"),
    ]
    loaded = [load(path, path, text="text", label="label", client="site") for path in paths]
    assert loaded[0].train == tuple(Row(f"text {i}", "ab"[i % 2], f"s{i % 3}") for i in range(20))
    assert all(other == loaded[0] for other in loaded)


def test_without_a_test_file_a_seeded_fifth_is_held_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    first = load(path, text="text", label="label")
    assert (len(first.train), len(first.test), first.name) == (16, 4, "a")
    assert len(load(path, text="text", label="label", test_rows=3).test) == 3
    assert load(path, text="text", label="label") == first
    assert load(path, text="text", label="label", seed=1) != first


def test_a_byte_order_mark_blank_lines_and_odd_line_breaks_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,label\r\n"two\nlines, é\x85\u2028",a\r\n\r\nplain,b\r\n'.encode())
    expected = (Row("two\nlines, é\x85\u2028", "a"), Row("plain", "b"))
    assert load(path, path, text="text", label="label").train == expected
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '\ufeff{"text": "é\x85\u2028x", "label": "a"}\r\n\n{"text": "plain", "label": "b"}'.encode()
    )
    assert load(path, path, text="text", label="label").train[0] == Row("é\x85\u2028x", "a")


def test_json_labels_may_be_numbers_or_booleans_and_labels_lose_outer_blanks(tmp_path: Path) -> None:
    values: list[object] = [10, 2, " x "]
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": value} for value in values])
    assert load(path, path, text="text", label="label").labels == ("2", "10", "x")
    path = jsonl(tmp_path / "b.jsonl", [{"text": "t", "label": value} for value in (True, False)])
    assert load(path, path, text="text", label="label").labels == ("false", "true")


def test_responses_stay_as_they_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": " q ", "a": " a\n"}])
    built = load(path, path, prompt="q", response="a")
    assert built.task == Instruction()
    assert built.train == (Row(" q ", " a\n"),)


@pytest.mark.parametrize(
    ("columns", "came"),
    [
        ({}, "none of them"),
        ({"text": "t", "response": "r"}, "got text and response"),
        ({"text": "t", "label": "l", "prompt": "p", "response": "r"}, "text and label and prompt and resp"),
    ],
)
def test_anything_but_one_pair_of_columns_is_refused(
    columns: dict[str, str], came: str, tmp_path: Path
) -> None:
    (tmp_path / "unread.jsonl").write_text("no JSON")
    with pytest.raises(ConfigError, match=rf"text and label.*prompt and response.*{came}"):
        load(tmp_path / "unread.jsonl", **columns)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: expected a data file, got none; check the path"):
        load(tmp_path / "none.jsonl", text="text", label="label")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match=r"folder\.csv: expected a readable file, got Is a directory"):
        rows_of(tmp_path / "folder.csv", text="text", label="label", labels="ab")
    for name in ("data.xlsx", "data"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"data\.xlsx: .*\.jsonl, \.json, \.csv or \.tsv, got '\.xlsx'"):
        load(tmp_path / "data.xlsx", text="text", label="label")
    with pytest.raises(DataError, match=r"data: .*got none; convert"):
        load(tmp_path / "data", text="text", label="label")


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    assert "a.csv: expected one row or more" in message(tmp_path / "a.csv", content)
    if "text" not in content:
        assert "a.jsonl: expected one row or more" in message(tmp_path / "a.jsonl", content)


def test_a_missing_column_is_answered_with_those_that_exist_and_the_nearest(tmp_path: Path) -> None:
    said = message(tmp_path / "a.csv", "text,lable,site\nx,a,b\n")
    assert (
        "a.csv:1: expected a column 'label', got 'text', 'lable', 'site'; did you mean data.label=lable?"
        in said
    )
    said = message(tmp_path / "a.jsonl", '{"text": "x", "label": "a"}\n{"text": "x", "y": "a"}\n')
    assert "a.jsonl:2: expected the key 'label', which the rows before have, got 'text', 'y'; add it" in said
    said = message(tmp_path / "a.jsonl", '{"text": "x", "label": "a"}\n{"text": "x", "lable": "a"}\n')
    assert "a.jsonl:2: expected the key 'label'" in said
    assert "rename 'lable' in this row, or remove the row" in said
    said = message(tmp_path / "a.jsonl", '\n{"text": "x", "y": "a"}\n')
    assert "a.jsonl:2: expected a column 'label', got 'text', 'y'; set data.label= to the right one" in said
    said = message(tmp_path / "b.jsonl", '{"q": "x", "a": "y"}\n', prompt="q", response="a", client="site")
    assert "'site'" in said
    assert "set data.client=" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x", y}', "broken JSON (Expecting property name enclosed in double quotes at column 15)"),
        ("[" * 100_000, "broken JSON"),
        ('["x", "a"]', "expected a JSON object, got the JSON list; write one"),
        ('{"text": "x", "label": null}', "expected a string, an integer or a boolean in 'label', got null"),
        ('{"text": "x", "label": 1.5}', "got the type float"),
        ('{"text": "x", "label": " "}', "expected text in 'label', got an empty cell"),
        ('{"text": "", "label": "a"}', "expected text in 'text', got an empty cell"),
        ('{"text": 3, "label": "a"}', "expected a string in 'text', got the type int"),
        ('{"text": {"x": 1}, "label": "a"}', "got the type dict"),
        ('{"text": "\\ud83d", "label": "a"}', "half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    said = message(tmp_path / "a.jsonl", '{"text": "x", "label": "a"}\n\n' + line + "\n")
    assert "a.jsonl:3: " in said
    assert words in said


@pytest.mark.parametrize(
    ("rest", "where", "words"),
    [
        ("x,a,b\n", 2, "expected 2 cells as in the header, got 3; put quotes"),
        ("x,a\ny\n", 3, "got 1 and none for 'label'; write the missing ones (an empty cell keeps its ',')"),
        ('"two\nlines",a\n,b\n', 4, "expected text in 'text', got an empty cell"),
        ('x,a\n"open,b\n', 3, "broken quoting"),
        ('"x" y,a\n', 2, "broken quoting"),
    ],
)
def test_a_bad_csv_row_is_named_by_file_and_line(tmp_path: Path, rest: str, where: int, words: str) -> None:
    said = message(tmp_path / "a.csv", "text,label\n" + rest)
    assert f"a.csv:{where}: " in said
    assert words in said


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    assert "a.csv:1: expected each column once" in message(tmp_path / "a.csv", "text,label,label\nx,a,b\n")


def test_another_encoding_is_named_by_its_line_and_byte(tmp_path: Path) -> None:
    said = message(tmp_path / "a.csv", "text,label\ncafé,a\n".encode("latin-1"))
    assert "a.csv:2: expected UTF-8 text, got the byte 0xe9; save the file as UTF-8" in said
    assert "b.jsonl:1: expected UTF-8 text, got UTF-16" in message(
        tmp_path / "b.jsonl", '{"text": "x"}'.encode("utf-16")
    )


def folder(path: Path) -> Path:
    """Three clients' files, one of each form, and what else may lie in a folder."""
    path.mkdir()
    jsonl(path / "b.jsonl", ROWS[:10])
    table(path / "a.csv", [["label", "text"], ["a", "of a"], ["b", "too"]])
    table(path / "ward 3.tsv", [["text", "label"], ["of three", "b"]], "\t")
    (path / "README.txt").write_text("no rows")
    (path / "._b.jsonl").write_bytes(b"\x00")  # what macOS leaves beside a copied file
    (path / "old").mkdir()
    return path


def test_the_files_of_a_folder_are_natural_clients_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = folder(tmp_path / "sites")
    built = load(path, path, text="text", label="label")
    assert [row.client for row in built.train] == ["a"] * 2 + ["b"] * 10 + ["ward 3"]
    assert built.train[:3] == (Row("of a", "a", "a"), Row("too", "b", "a"), Row("text 0", "a", "b"))
    assert built.test == built.train
    assert (built.name, [part.name for part in partition(built.train, "natural", None)]) == (
        "sites",
        ["a", "b", "ward 3"],
    )
    assert held_out(path, text="text", label="label").test == built.train


def test_rows_held_out_of_a_folder_keep_their_client(tmp_path: Path) -> None:
    path = folder(tmp_path / "sites")
    built = load(path, text="text", label="label", test_rows=2)
    whole = load(path, path, text="text", label="label").train
    assert len(built.test) == 2
    assert {*built.train, *built.test} == {*whole}
    assert all(row.client for row in built.test)


def test_one_file_may_be_tested_on_and_a_folder_trained_on(tmp_path: Path) -> None:
    path, test = folder(tmp_path / "sites"), jsonl(tmp_path / "test.jsonl", ROWS[:2])
    assert {row.client for row in load(path, test, text="text", label="label").test} == {None}


def test_a_folder_is_refused_with_a_client_column_without_files_and_with_one_name_twice(
    tmp_path: Path,
) -> None:
    path, one = folder(tmp_path / "sites"), jsonl(tmp_path / "one.jsonl", ROWS)
    for given in ((path, None), (one, path)):
        with pytest.raises(ConfigError, match=r"sites: expected a file.*'site'.*a folder.*leave client out"):
            load(*given, text="text", label="label", client="site")
    with pytest.raises(DataError, match=r"old: expected files ending in .jsonl.*got none"):
        load(path / "old", text="text", label="label")
    table(path / "b.csv", [["text", "label"], ["x", "a"]])
    with pytest.raises(DataError, match=r"sites: expected one file for each client, got b.csv and b.jsonl"):
        load(path, text="text", label="label")


def test_a_site_has_one_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a file ending in"):
        rows_of(folder(tmp_path / "sites"), text="text", label="label", labels="ab")


def test_a_missing_file_is_named_before_its_columns_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\n")
    for files in ({"train": tmp_path / "b.csv"}, {"train": tmp_path / "a.csv", "test": tmp_path / "b.csv"}):
        with pytest.raises(DataError, match=r"b\.csv: expected a data file, got none"):
            load(**files, label="label")


def test_one_column_of_two_is_answered_with_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\n")
    said = r"^data\.text: expected the column of the text beside data\.label=kind, got none; say data\.text="
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "a.csv", label="kind")
    with pytest.raises(ConfigError, match=r"^data\.response: expected the column of the response beside"):
        load(tmp_path / "a.csv", prompt="q", text=None)
