"""What a user of transformers and PEFT gets from a classifier's adapter/: the right label for every text."""

import csv
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
WORDS = ["river", "guitar", "planet", "bakery", "tractor", "dentist", "volcano", "football", "passport"]
WORDS += ["candle", "elephant", "umbrella"]
SMALL = ("model=tiny", "data=files", "clients=2", "rounds=3", "data.text=text", "data.label=label")

pytestmark = [
    pytest.mark.slow,  # whole runs
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft and transformers about each other
]


def notes(path: Path, count: int, seed: int) -> Path:
    """Notes about twelve things, labelled 0 to 11."""
    rng = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(count):
            writer.writerow([f"{WORDS[i % 12]} {rng.randint(1, 99)}", i % 12])
    return path


def by_readme(adapter: Path, base: str) -> dict[str, Any]:
    """Run the page's own lines on an adapter; the names that they leave."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    code = next(block for block in blocks if "PeftModel" in block)
    assert "runs/second/adapter" in code
    assert "FOLDER_OR_HUB_NAME" in code
    left: dict[str, Any] = {}
    exec(code.replace("runs/second/adapter", str(adapter)).replace("FOLDER_OR_HUB_NAME", base), left)
    return left


# It has to learn something, or every order of labels were as good.
def test_integer_labels_are_the_indices_and_the_readme_s_lines_name_them(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    from fedlora.models.packaged import tiny

    train, test = notes(tmp_path / "train.csv", 144, 0), notes(tmp_path / "test.csv", 60, 1)
    found = run(f"data.train={train}", f"data.test={test}", "client.epochs=4", base=SMALL)
    said = found.summary["accuracy"]
    assert said > 0.5  # far above the twelfth that guessing reaches
    left = by_readme(found.path / "adapter", str(tiny()))
    rows = list(csv.DictReader(test.read_text(encoding="utf-8").splitlines()))
    batch = left["tokenizer"]([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        chosen = left["model"](**batch).logits.argmax(-1).tolist()
    labels = [row["label"] for row in rows]
    assert sum(int(label) == i for label, i in zip(labels, chosen, strict=True)) == pytest.approx(said * 60)
    names = left["model"].config.id2label
    assert [names[i] for i in range(12)] == [str(i) for i in range(12)]


def test_words_are_named_too(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    from fedlora.models.packaged import tiny

    found = run("rounds=1")
    capsys.readouterr()
    left = by_readme(found.path / "adapter", str(tiny()))
    assert left["config"].label2id == {"animal": 0, "tool": 1}
    assert capsys.readouterr().out.strip() in ("['animal']", "['tool']")


def test_natural_clients_are_numbered_as_they_count(run: Callable[..., Any], tmp_path: Path) -> None:
    """So that ranks, dealt in turn, go to sites 1, 2, 3, ... and not to 1, 10, 11, 2, ..."""
    train = tmp_path / "rows.csv"
    lines = [f"the {WORDS[i % 2]} {i},{i % 2},{i % 12}" for i in range(120)]
    train.write_text("\n".join(["text,label,site", *lines]) + "\n", encoding="utf-8")
    natural = ("clients=null", "data.partition=natural", "data.client=site", "rounds=1", "ranks=[2,4]")
    found = run(f"data.train={train}", *natural, "strategy=flexlora", base=SMALL)
    clients = json.loads((found.path / "data.json").read_text())["clients"]
    assert [client["name"] for client in clients] == [str(i) for i in range(12)]
