"""Lines about settings and rows that do not do what they seem to do; the run goes on all the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.cli.main import main
from fedlora.config.composition import compose
from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs

TEXTS = [f"the {word} is {n}" for word in ("cat", "saw") for n in range(5)]
LONG = TEXTS[3]  # this one is written longer
JOB = ("model=tiny", "data=files", "data.text=text", "data.label=label", "clients=3", "rounds=1", "ranks=2")


def rows(path: Path, count: int = 100, **more: str) -> Path:
    """So many rows of ten texts."""
    found = [
        {"text": text + " w1 w2" * 10 * (text == LONG), "label": text.split()[1], **more}
        for text in (TEXTS * count)[:count]
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture
def warned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., list[str]]:
    """The warnings of a run, which finishes."""

    def go(*words: str) -> list[str]:
        capsys.readouterr()
        main(["run", *JOB, *words, f"out={tmp_path / 'run'}"])
        assert (tmp_path / "run" / "summary.json").exists()
        lines = capsys.readouterr().out.splitlines()
        return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]

    return go


def test_rows_repeated_across_the_cut_and_rows_too_long_are_counted(
    warned: Callable[..., list[str]], tmp_path: Path
) -> None:
    repeated, cut = warned(f"data.train={rows(tmp_path / 'rows.jsonl')}", "data.max_length=20")
    assert repeated.startswith("20 of 20 test rows have the text of a training row")
    notice = cut.split()
    assert int(notice[0]) + int(notice[6]) == 10  # of a hundred rows one in ten is long
    assert "data.max_length=20" in cut


def test_a_row_of_just_max_length_tokens_is_not_counted_as_cut(
    warned: Callable[..., list[str]], tmp_path: Path
) -> None:
    from fedlora.config.translate import run_spec
    from fedlora.runner.assemble import assemble

    train = f"data.train={rows(tmp_path / 'rows.jsonl')}"
    longest = max(len(example.input_ids) for example in assemble(run_spec(compose([*JOB, train]))).test)
    test = f"data.test={rows(tmp_path / 'test.jsonl', 10)}"
    assert not [line for line in warned(train, test, f"data.max_length={longest}") if "longer" in line]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about itself
def test_validation_rows_are_called_so(
    warned: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = rows(tmp_path / "rows.jsonl"), rows(tmp_path / "test.jsonl", 10)
    (line,) = warned(f"data.train={train}", f"data.test={test}", "evaluate.rows=validation")
    assert line.startswith("20 of 20 validation rows have the text")
    main(["verify", str(tmp_path / "run")])
    assert capsys.readouterr().out.strip().endswith("on 20 validation rows")


def test_natural_clients_are_all_taken_unless_a_number_says_otherwise(
    warned: Callable[..., list[str]], tmp_path: Path
) -> None:
    for name in "abcd":
        rows(tmp_path / "folder" / f"{name}.jsonl", 20)
    words = ["model=tiny", "data=files", f"data.train={tmp_path / 'folder'}", "data.partition=natural"]
    assert compose(words).clients is None
    assert compose([*words, "clients=2"]).clients == 2
    assert compose([*words, "data.partition=iid"]).clients == 8
    assert compose(["model=tiny", "data=sites", "data.test=x"]).clients == 8
    main(
        [
            "run",
            *words,
            "data.text=text",
            "data.label=label",
            "rounds=1",
            "ranks=2",
            f"out={tmp_path / 'all'}",
        ]
    )
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["clients"] == 4


@pytest.mark.parametrize("privacy", ["privacy=dp_sgd", "secure_sum=true"])
def test_protected_rows_are_not_counted(
    warned: Callable[..., list[str]], tmp_path: Path, privacy: str
) -> None:
    train, test = rows(tmp_path / "rows.jsonl"), rows(tmp_path / "test.jsonl", 20)
    (line,) = warned(f"data.train={train}", f"data.test={test}", "data.max_length=20", privacy)
    assert line.startswith("2 of 20 test rows are longer")  # a file that its owner says may be seen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clients_per_round=4"], ["clients_per_round=4, but there are 3 clients"]),
        (["clients_per_round=3"], []),
        (["client.schedule=linear", "client.steps=1"], ["client.schedule=linear starts anew"]),
        (["client.schedule=cosine", "client.batch_size=100"], ["client.schedule=cosine starts anew"]),
        (["client.schedule=linear", "client.steps=2"], []),
        (["client.steps=1"], []),
    ],
)
def test_settings_that_do_nothing(
    warned: Callable[..., list[str]], tmp_path: Path, words: list[str], said: list[str]
) -> None:
    train, test = rows(tmp_path / "rows.jsonl", 48), rows(tmp_path / "test" / "rows.jsonl", 10)
    test.write_text(test.read_text().replace("the", "a"))
    found = warned(f"data.train={train}", f"data.test={test}", *words)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


def test_natural_clients_that_are_pooled(warned: Callable[..., list[str]], tmp_path: Path) -> None:
    for name in "abc":
        rows(tmp_path / "folder" / f"{name}.jsonl", 20)
    test = rows(tmp_path / "test.jsonl", 10)
    test.write_text(test.read_text().replace("the", "a"))
    words = (f"data.train={tmp_path / 'folder'}", f"data.test={test}")
    (line,) = warned(*words)
    assert line.startswith("the files name the client of each row, but data.partition=iid pools")
    assert "data.partition=natural" in line


def test_natural_clients_that_are_kept_need_no_line(warned: Callable[..., list[str]], tmp_path: Path) -> None:
    for name in "abc":
        rows(tmp_path / "folder" / f"{name}.jsonl", 20)
    test = rows(tmp_path / "test.jsonl", 10)
    test.write_text(test.read_text().replace("the", "a"))
    words = (f"data.train={tmp_path / 'folder'}", f"data.test={test}")
    assert warned(*words, "data.partition=natural") == []


@pytest.mark.parametrize(("choice", "key"), [("files", "train"), ("hub", "path")])
def test_data_without_its_path_is_named_in_one_line(choice: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{key}: needs a value, got none; say data\.{key}=\.\.\.$"):
        compose([f"data={choice}"])
