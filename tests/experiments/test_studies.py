import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.data.files import load

SCRIPT = Path(__file__).parents[2] / "experiments" / "studies" / "instructions.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("instructions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two tasks of 220 rows, one of which asks every prompt four times, and a file of another form."""
    at = tmp_path / "source"
    at.mkdir()
    for task, often in (("once", 1), ("often", 4)):
        rows = [
            {"prompt": f"{task} {i // often}?\n", "completion": f" said {i}\n<|endoftext|>"}
            for i in range(220)
        ]
        (at / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (at / "other.jsonl").write_text('{"instruction": "x", "instances": []}\n')
    return at


def test_tasks_become_files_of_clients_that_share_no_prompt_with_the_test(
    script: Any, source: Path, tmp_path: Path, capsys: Any
) -> None:
    to = tmp_path / "made"
    script.main([str(source), str(to)])
    assert "other: left out" in capsys.readouterr().out
    built = load(to / "train", to / "test", prompt="prompt", response="response")
    for task, rows in (("once", 180), ("often", 140)):
        train = [row for row in built.train if row.client == task]
        test = [row for row in built.test if row.client == task]
        assert (len(train), len(test), len({row.source for row in test})) == (rows, 20, 20)
        assert not {row.source for row in train} & {row.source for row in test}
    assert {row.client for row in built.train} == {"once", "often"}
    for row in built.train + built.test:
        assert row.source == row.source.strip()
        assert row.target.startswith("said ")
        assert row.target == row.target.strip()
        assert "<|" not in row.target
    drawn = [int(row.target.split()[1]) for row in built.test if row.client == "once"]
    assert drawn != sorted(drawn)  # not the file's last or first
    script.main([str(source), str(tmp_path / "again")])
    for file in to.rglob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(to)).read_bytes()
