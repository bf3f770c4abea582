import json
import sys
from pathlib import Path

import pytest

from fedlora.data import hub
from fedlora.data.dataset import Row
from fedlora.errors import ConfigError, DataError
from fedlora.tasks import Instruction

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"text {i}", "label": i % 2, "site": f"s{i % 3}"} for i in range(10)]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    made = tmp_path / "made"
    made.mkdir()
    lines = [json.dumps(row) for row in ROWS]
    (made / "train.jsonl").write_text("\n".join(lines))
    (made / "test.jsonl").write_text("\n".join(lines[:4]))
    return str(made)


def given(monkeypatch: pytest.MonkeyPatch, **splits: list[object]) -> None:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )
    tables = {
        name: datasets.Dataset.from_dict(
            {"text": [f"t{i}" for i in range(len(labels))], "label": labels}, features
        )
        for name, labels in splits.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: datasets.DatasetDict(tables))


def test_a_local_folder_loads_offline(folder: str) -> None:
    data = hub.load(folder, text="text", label="label", client="site")
    assert data.train == tuple(Row(f"text {i}", str(i % 2), f"s{i % 3}") for i in range(10))
    assert data.test == data.train[:4]


def test_a_folder_of_csv_gives_instructions_and_a_held_out_part(tmp_path: Path) -> None:
    made = tmp_path / "csv"
    made.mkdir()
    (made / "train.csv").write_text("q,a\n" + "".join(f"question {i},answer {i}\n" for i in range(10)))
    data = hub.load(str(made), prompt="q", response="a", test_split=None, seed=3)
    assert (data.task, len(data.train), len(data.test)) == (Instruction(), 8, 2)


def test_class_numbers_become_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, train=[1, 0], test=[1])
    data = hub.load("some/set", text="text", label="label")
    assert data.train == (Row("t0", "pos"), Row("t1", "neg"))
    assert data.labels == ("neg", "pos")


@pytest.mark.parametrize("hidden", [-1, None])
def test_an_unlabelled_split_is_refused(monkeypatch: pytest.MonkeyPatch, hidden: object) -> None:
    given(monkeypatch, train=[1, 0], test=[0, hidden])
    with pytest.raises(
        DataError, match=r"'some/set', split 'test', row 1: expected a class number.*labelled"
    ):
        hub.load("some/set", text="text", label="label")


def test_a_split_that_does_not_exist_is_answered_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, train=[1, 0], validation=[1])
    with pytest.raises(DataError, match=r"expected a split 'test', got 'train', 'validation'; set split="):
        hub.load("some/set", text="text", label="label")


def test_a_missing_column_names_the_split(folder: str) -> None:
    with pytest.raises(DataError, match=r"split 'train': expected a column 'labels'.*label=label\?"):
        hub.load(folder, text="text", label="labels")


def test_the_columns_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"beside data\.text=text, got none; say data\.label=COLUMN"):
        hub.load("some/set", text="text")


def test_any_failure_of_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: str, name: str | None) -> None:
        raise ConnectionError("no\nroute")

    with pytest.raises(DataError, match="check the name") as caught:
        hub.load(str(tmp_path / "nothing"), text="text", label="label")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'some/set'.*ConnectionError: no route; check the name"):
        hub.load("some/set", text="text", label="label")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "fedlora\[hub\]"'):
        hub.load("some/set", text="text", label="label")
