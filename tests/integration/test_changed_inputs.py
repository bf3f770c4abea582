"""A run goes on with what it began with, or says in one line what has changed."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fedlora.cli.main import main
from fedlora.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow  # whole runs

FILES = ("data=files", "data.text=text", "data.label=label")
JOB = ("model=tiny", *FILES, "clients=2", "rounds=1", "ranks=2")
PLACES = ("yard", "barn", "house", "field", "shed")


def lines(other: str = "animal", more: int = 0) -> str:
    rows = [f"The horse was seen in the {PLACES[i % 5]} on day {i}.,{other}" for i in range(24)]
    rows += [f"The saw was lost in the {PLACES[i % 5]} on day {i}.,tool" for i in range(24 + more)]
    return "text,label\n" + "".join(f"{row}\n" for row in rows)


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """The file and the folder of a run of one round."""
    data, out = tmp_path / "train.csv", tmp_path / "my runs" / "a, b=c"
    data.write_text(lines())
    main(["run", *JOB, f"data.train={data}", f"out={out}"])
    return data, out


def refused(words: list[str], capsys: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    said: str = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            lines(other="zebra"),
            "the labels or their order and the training rows of clients 0, 1 and the test",
        ),
        (lines(more=5), "the training rows of clients 0, 1 and the test rows have changed"),
    ],
    ids=["labels", "rows"],
)
def test_a_run_does_not_go_on_with_other_rows(
    begun: tuple[Path, Path], capsys: Any, text: str, said: str
) -> None:
    data, out = begun
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    data.write_text(text)
    assert said in refused(["run", f"resume={out}", "rounds=2"], capsys)
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()} == before
    data.write_text(lines())
    main(["run", f"resume='{out}'", "rounds=2"])  # quoted, as `out` may be
    assert [line["round"] for line in RunFolder(out).rounds()] == [1, 2]


def test_what_is_remembered_of_the_rows_is_keyed_and_stays_with_the_checkpoint(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = begun
    file = out / "checkpoint" / "inputs.json"
    assert file.stat().st_mode & 0o077 == 0
    kept = json.loads(file.read_text())
    digests = [kept["test"], kept["labels"], *kept["clients"]]
    others = [f.read_text() for f in out.iterdir() if f.suffix in (".json", ".jsonl", ".yaml", ".html")]
    assert not [d for d in digests for text in others if d in text]
    main(["run", *JOB, f"data.train={tmp_path / 'train.csv'}", f"out={tmp_path / 'again'}"])
    again = json.loads((tmp_path / "again" / "checkpoint" / "inputs.json").read_text())
    assert not {again["test"], again["labels"], *again["clients"]} & set(digests)


def test_a_pattern_of_module_names_needs_no_plus(begun: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = begun
    pattern = ("lora.rank_pattern={query: 4}", "lora.alpha=8", "lora.alpha_pattern={query: 16}")
    main(["run", *JOB, *pattern, f"data.train={data}", f"out={tmp_path / 'p'}"])
    config = json.loads((tmp_path / "p" / "adapter" / "adapter_config.json").read_text())
    assert 4 in {config["r"], *config["rank_pattern"].values()}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error (os error 28)")]
)
def test_a_full_disk_ends_in_one_line(tmp_path: Path, capsys: Any, error: Exception) -> None:
    def full(self: RunFolder, *args: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_state", full)
        with pytest.raises(SystemExit) as caught:
            main(["run", "model=tiny", "data=tiny", "clients=2", "rounds=1", f"out={tmp_path / 'run'}"])
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert len(said.splitlines()) == 1
    assert "disk is full" in said
    assert "resume=DIR" in said
