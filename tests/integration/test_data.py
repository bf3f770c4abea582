import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # whole runs

WORDS = {"tier": ["cat", "dog", "horse", "goose"], "wërkzeug 🔨": ["hammer", "saw", "drill", "file"]}
ROWS = [
    {"satz": f'the {word} is {n}, "really"', "art": label, "ort": f"site-{n % 3}"}
    for label, words in WORDS.items()
    for word in words
    for n in range(6)
]
FILES = ("model=tiny", "data=files", "rounds=1", "ranks=2", "data.text=satz", "data.label=art")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_jsonl_and_csv_give_the_same_run(run: Callable[..., Any], tmp_path: Path) -> None:
    shas = set()
    for ending in ("jsonl", "csv"):
        train = write(tmp_path / f"meine zeilen.{ending}", ROWS)
        test = write(tmp_path / f"prüfung.{ending}", ROWS[::5])
        found = run(f"data.train='{train}'", f"data.test='{test}'", "clients=2", base=FILES)
        shas.add(found.sha)
    assert len(shas) == 1


def test_natural_clients(run: Callable[..., Any], tmp_path: Path) -> None:
    train = write(tmp_path / "rows.jsonl", ROWS)
    natural = ("data.client=ort", "data.partition=natural", "clients=null", f"data.train='{train}'")
    found = run(*natural, base=FILES)
    assert found.summary["clients"] == 3
    assert sum(line["examples"] for line in found.clients) == 48 - 48 // 5


def test_one_client(run: Callable[..., Any], tmp_path: Path) -> None:
    train = write(tmp_path / "rows.jsonl", ROWS[:2] + ROWS[-4:])
    found = run(f"data.train='{train}'", "clients=1", "evaluate.clients=true", base=FILES)
    assert found.metrics[0]["clients"] == 1
    assert found.metrics[0]["aggregation_error"] < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers about each other
def test_instructions_on_a_decoder(run: Callable[..., Any], llama: Path, tmp_path: Path, capsys: Any) -> None:
    from fedlora.cli.main import main

    rows = [{"frage": f"what is {row['satz']}?", "antwort": row["art"]} for row in ROWS]
    train = write(tmp_path / "rows.jsonl", rows)
    words = (
        "model=hub",
        f"model.path='{llama}'",
        "data=files",
        f"data.train='{train}'",
        "clients=2",
        "ranks=[2,3]",
    )
    more = ("data.prompt=frage", "data.response=antwort", "rounds=2", "strategy=flexlora", "client.steps=4")
    found = run(*words, *more, base=())
    assert found.summary["metric"] == "perplexity"
    assert found.summary["perplexity"] < found.summary["initial"]["perplexity"]
    assert all(m["perplexity"] > 1 and 0 <= m["token_accuracy"] <= 1 for m in found.metrics)
    capsys.readouterr()
    main(["verify", str(found.path)])
    assert capsys.readouterr().out.startswith("ok")
