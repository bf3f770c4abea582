import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora import Adapter, Pair, Update
from fedlora.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
ROOMS = sorted(path.parent for path in (ROOT / "fedlora").glob("*/__init__.py"))


def blocks(language):
    found = (
        re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        for text in PAGES.values()
    )
    return [block for page in found for block in page]


def test_the_readme_is_short():
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 160


def test_links_lead_somewhere():
    more = [*(ROOT / "experiments").rglob("*.md"), *(room / "README.md" for room in ROOMS)]
    for path, text in (PAGES | {path: path.read_text(encoding="utf-8") for path in more}).items():
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in link or (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_the_page_of_a_room_is_short_and_names_each_of_its_files(room):
    text = (room / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45
    assert text.startswith(f"# {room.name}\n")
    assert "../../docs/" in text
    files = {path.name for path in room.iterdir() if path.suffix in (".py", ".j2")} - {"__init__.py"}
    folders = {f"{path.name}/" for path in room.iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(files | folders), (
        "one row in the table for each file and folder of the room"
    )


def test_the_example_algorithm_runs_as_it_is_printed():
    code = next(block for block in blocks("python") if "MedianFedIT" in block)
    module = {"__name__": "example"}
    exec(code, module)
    strategy = module["MedianFedIT"]()
    one = Adapter({"m": Pair(torch.ones(2, 3), torch.ones(4, 2))}, {"head": torch.ones(2)})
    three = Adapter({"m": Pair(torch.full((2, 3), 3.0), torch.ones(4, 2))}, {"head": torch.ones(2)})
    nine = Adapter({"m": Pair(torch.full((2, 3), 9.0), torch.ones(4, 2))}, {"head": torch.ones(2)})
    after = strategy.aggregate(
        strategy.init(one), [Update(one), Update(three), Update(nine)], np.random.default_rng(0)
    )
    assert torch.equal(after.adapter.pairs["m"].A, torch.full((2, 3), 3.0))


def test_the_table_has_every_strategy():
    from fedlora import strategies

    named = {name.lower() for name in strategies.__all__}
    assert named == set(
        re.findall(r"^\| `(\w+)` \|", PAGES[ROOT / "docs" / "strategies.md"], flags=re.MULTILINE)
    )


def test_its_commands_are_make_targets_and_verbs(capsys):
    targets = set(re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    main(["--help"])
    verbs = set(re.findall(r"^  (\w+)  ", capsys.readouterr().out, flags=re.MULTILINE))
    for block in blocks("bash"):
        for line in block.splitlines():
            words = line.split()
            if words[:1] == ["make"]:
                assert words[1] in targets
            if words[:1] == ["fedlora"]:
                assert words[1] in verbs
