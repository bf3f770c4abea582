"""Files as people have them: no row is lost or made up, and what cannot be read is called what it is."""

import json
import re
import warnings
from pathlib import Path

import pytest

from fedlora.data.files import held_out, load
from fedlora.errors import ConfigError, DataError

COLUMNS = {"text": "text", "label": "label"}


def refused(path: Path, **columns: str) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        load(path, **(columns or COLUMNS))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(count: int = 60, separator: str = "\t") -> list[str]:
    """Rows of which some begin with a quotation mark that nothing closes, as in the sets of GLUE."""
    words = ["cat", "saw"]
    texts = [f'"the {words[i % 2]} {i}' if i % 11 == 5 else f"the {words[i % 2]} {i}" for i in range(count)]
    return [f"text{separator}label", *(f"{text}{separator}{i % 2}" for i, text in enumerate(texts))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quote_in_a_tsv_is_text_and_every_line_is_a_row(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(end.join([*lines(), ""]).encode())
    rows = load(path, path, **COLUMNS).train
    assert len(rows) == 60
    assert (rows[5].source, rows[5].target) == ('"the saw 5', "1")


def test_quotes_of_a_tsv_enclose_cells_where_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"a ""tab""\tand a\nline"\tx\n"a\ttab"\tx\nplain\ty\n', "utf-8")
    rows = load(path, path, **COLUMNS, quotes=True).train
    assert [row.source for row in rows] == ['a "tab"\tand a\nline', "a\ttab", "plain"]
    assert [row.source for row in held_out(path, **COLUMNS, quotes=True).test] == [r.source for r in rows]
    assert "data.quotes=true" in refused(path)


def test_cells_that_all_are_enclosed_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"one"\t"x"\n"two ""2"""\t"y"\n', "utf-8")
    with pytest.warns(
        UserWarning, match=r"a\.tsv: quotes are read as part of the text, and all 4.*quotes=true"
    ):
        load(path, path, **COLUMNS)


def test_rows_that_a_quote_of_a_csv_swallows_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = lines(separator=",")[:20]
    rows[17] = 'the saw 16",0'  # here the quote of line 7 finds its end
    path.write_text("\n".join(rows) + "\n", "utf-8")
    with pytest.warns(
        UserWarning, match=r"a\.csv: 20 lines made 8 rows; 1 rows.*lines 7 to 18.*quotes=false"
    ):
        assert len(load(path, path, **COLUMNS).train) == 8
    assert len(load(path, path, **COLUMNS, quotes=False).train) == 19


def test_line_breaks_in_the_cells_of_a_csv_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"Hello, you.\nBye.",a\n"one\ntwo, three\nfour",b\n', "utf-8")
    with warnings.catch_warnings(action="error"):
        assert len(load(path, path, **COLUMNS).train) == 2


@pytest.mark.parametrize(
    "labels", [["0.000", "0.5", "5.000"], ["0", "0.0", "1"], ["1e-3", "-2.5"], [0.5, 1.5]]
)
def test_scores_are_not_classes(tmp_path: Path, labels: list[object]) -> None:
    texts = [f"text {i}" for i in range(len(labels))]
    path = tmp_path / "a.csv"
    path.write_text(
        "text,label\n" + "".join(f"{t},{v}\n" for t, v in zip(texts, labels, strict=True)), "utf-8"
    )
    assert "regression is not available yet" in refused(path)
    with pytest.raises(DataError, match="regression is not available yet"):
        held_out(path, **COLUMNS)
    path = tmp_path / "a.jsonl"
    rows = [{"text": t, "label": v} for t, v in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert "regression is not available yet" in refused(path)


def test_versions_and_words_with_dots_are_classes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,v1.0\ntwo,2.0\nthree,1.2.3\n", "utf-8")
    assert load(path, path, **COLUMNS).labels == ("1.2.3", "2.0", "v1.0")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([str(i) for i in range(80)], r"80 different integers are labels"),
        (["1", "0", "true", "False"], r"truth values .*true.* and integers .*0.* are labels side by side"),
    ],
)
def test_labels_that_hardly_are_classes_are_told(tmp_path: Path, labels: list[str], said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{v}\n" for i, v in enumerate(labels)), "utf-8")
    with pytest.warns(UserWarning, match=said):
        assert len(load(path, path, **COLUMNS).labels) == len(labels)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_called_one(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "alpaca.json"
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]
    path.write_text(json.dumps(rows, indent=indent), "utf-8")
    said = refused(path)
    assert "alpaca.json: expected one JSON object a line, got one JSON array of 6" in said
    assert "jq -c" in said
    path.write_text(json.dumps({"data": rows}, indent=2), "utf-8")
    assert "one JSON object over many lines, with 'data'" in refused(path)


@pytest.mark.parametrize(
    "cell",
    [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
    ],
)
def test_a_conversation_is_called_one(tmp_path: Path, cell: list[dict[str, str]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": cell}) + "\n", "utf-8")
    said = refused(path, prompt="messages", response="messages")
    assert "a.jsonl:1: expected text in 'messages', got a conversation of 2 turns" in said
    assert "not supported yet" in said


def test_two_columns_of_text_are_refused_and_a_half_of_a_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "RTE.tsv"
    path.write_text("sentence1\tsentence2\tlabel\na\tb\tx\nc\td\ty\n", "utf-8")
    both: object = ["sentence1", "sentence2"]
    said = refused(path, text=both, label="label")  # type: ignore[arg-type]
    assert "data.text: expected the name of one column, got 2 (sentence1, sentence2); join them" in said
    with pytest.warns(UserWarning, match=r"'sentence1' is read and 'sentence2' is not"):
        load(path, path, text="sentence1", label="label")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            "Nr;text;label\n1;x;a\n",
            r"a\.csv:1: expected cells separated by ',', got a header with ';'",
        ),
        ("a.csv", "text\tlabel\nx\ta\n", r"header with '\\t'; save the file with ',', or name it \.tsv"),
        ("a.tsv", "text,label\nx,a\n", r"expected cells separated by '\\t', got a header with ','"),
        (
            "a.csv",
            "sep=;\ntext;label\nx;a\n",
            r"a\.csv:1: .*a spreadsheet's own line 'sep=;'; remove this line",
        ),
        ("a.csv", "text,label\né,a\n".encode("cp1252"), r"a\.csv:2: .*byte 0xe9; .*iconv -f CP1252 -t UTF-8"),
        ("a.csv", "text,label\né,a\n".encode("utf-16"), r"a\.csv:1: .*UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "text,label\nx,a\n".encode("utf-16-le"), r"a\.csv:1: .*UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("a.parquet", b"PAR1", r"got '\.parquet'; data=hub data\.path=FOLDER"),
        ("a.xlsx", b"PK", r"got '\.xlsx'; save it as CSV UTF-8"),
        ("a.csv.gz", b"", r"got '\.gz'; unpack it"),
    ],
)
def test_a_file_is_called_what_it_is(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(said, refused(path))


def test_columns_may_be_called_like_numbers_and_truth_values(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,true,1.5\none,a,s\ntwo,b,t\n", "utf-8")
    data = load(path, path, text=1, label=True, client=1.5)  # type: ignore[arg-type]
    assert [(row.source, row.target, row.client) for row in data.train] == [
        ("one", "a", "s"),
        ("two", "b", "t"),
    ]


def test_test_rows_need_no_column_of_clients(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label,site\none,a,s\ntwo,b,t\n", "utf-8")
    test.write_text("text,label\none,a\n", "utf-8")
    data = load(train, test, **COLUMNS, client="site")
    assert ([row.client for row in data.train], [row.client for row in data.test]) == (["s", "t"], [None])
    assert load(train, train, **COLUMNS, client="site").test[0].client == "s"  # told where it is known
    with pytest.raises(DataError, match="expected a column 'site'"):
        load(test, **COLUMNS, client="site")
