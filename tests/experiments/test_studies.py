"""Studies: each holds its page and what makes it; the commands compose; the tasks of one are cut fairly."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.composition import compose
from fedlora.data.files import load

pytestmark = pytest.mark.slow  # whole runs

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path for path in (ROOT / "experiments" / "studies").iterdir() if path.is_dir())
MADE_ELSEWHERE = {"deploy": "tests/deploy/network.py", "speed": "experiments.benchmarks.peers"}
OF_COMMANDS = ["algorithms", "heterogeneity", "privacy", "report", "scale"]


def load_script(study: str) -> Any:
    path = ROOT / "experiments" / "studies" / study / "make.py"
    spec = importlib.util.spec_from_file_location(f"make_{study}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("instructions")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_holds_its_page_and_names_what_makes_it(study: Path) -> None:
    page = (study / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# ")
    if study.name in MADE_ELSEWHERE:
        assert MADE_ELSEWHERE[study.name] in page
    else:
        assert (study / "make.py").is_file()
        assert "make.py" in page


@pytest.mark.parametrize("study", OF_COMMANDS)
def test_the_commands_of_a_study_can_be_run(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    module = load_script(study)
    monkeypatch.setattr(module.subprocess, "run", lambda words, check: asked.append(words))
    module.main()
    assert len(asked) > 1
    for program, verb, *words in asked:
        if program == "python":
            assert (ROOT / verb).is_file()
        elif verb in ("run", "compare"):
            settings = [word for word in words if re.match(r"[a-z]\S*=", word)]
            settings = [word for word in settings if not word.startswith("hydra.")]
            compose([word if "[" in word else word.split(",")[0] for word in settings])
        else:
            assert (program, verb) == ("fedlora", "report")


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
