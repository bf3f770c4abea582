"""A run is read by what it holds: without its training rows, from any folder, without its strategy's code."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.cli.main import main

pytestmark = [
    pytest.mark.slow,  # whole runs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL = ("model=tiny", "data=files", "data.text=text", "data.label=label", "clients=2", "rounds=1", "ranks=2")
OWN = """
from fedlora.strategies import FedIT

class Mine(FedIT):
    pass
"""


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows, in which a user stands."""
    rows = [f"the {'cat' if i % 2 else 'saw'} {i},{'animal' if i % 2 else 'tool'}" for i in range(40)]
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_export_needs_neither_rows_nor_the_folder_that_the_run_was_made_in(placed: Path) -> None:
    main(["run", *SMALL, "data.train=train.csv", "out=run"])
    (placed / "train.csv").unlink()
    os.chdir("elsewhere")
    main(["export", "../run", "--to", "adapter"])
    main(["export", "../run", "--to", "merged", "--merge"])
    name = "adapter_model.safetensors"
    assert (placed / "elsewhere/adapter" / name).read_bytes() == (placed / "run/adapter" / name).read_bytes()


def test_verify_and_replay_need_the_test_rows_alone(
    placed: Path, capsys: Any, refused: Callable[..., str]
) -> None:
    main(["run", *SMALL, "data.train=train.csv", "data.test=test.csv", "record_updates=true", "out=run"])
    (placed / "train.csv").unlink()
    os.chdir("elsewhere")
    capsys.readouterr()
    main(["verify", "../run"])
    assert capsys.readouterr().out.startswith("ok: SHA-256")
    main(["replay", "../run", "strategy=flexlora"])
    assert "FlexLoRA on what clients of FedIT sent" in capsys.readouterr().out
    (placed / "test.csv").unlink()
    assert "test.csv: expected a data file" in refused("verify", "../run")


def test_a_run_made_by_relative_paths_goes_on_from_any_folder(placed: Path) -> None:
    main(["run", *SMALL, "data.train=train.csv", "data.test=test.csv", "out=run"])
    os.chdir("elsewhere")
    main(["run", "resume=../run", "rounds=2"])
    assert len((placed / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_a_strategy_of_a_script_is_exported_and_verified_where_it_is_unknown(
    placed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (placed / "own_strategy.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(placed))
    target = "strategy._target_=own_strategy.Mine"
    main(
        [
            "run",
            *SMALL,
            "data.train=train.csv",
            "data.test=test.csv",
            target,
            "allow=[own_strategy]",
            "out=run",
        ]
    )
    (placed / "own_strategy.py").unlink()
    monkeypatch.delitem(sys.modules, "own_strategy")
    main(["export", "run", "--to", "adapter"])
    capsys.readouterr()
    main(["verify", "run"])
    assert capsys.readouterr().out.startswith("ok: SHA-256")


@pytest.mark.filterwarnings("ignore:model.dtype=bfloat16")  # of a processor that is slow at it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merged_model_has_the_precision_and_the_size_of_its_base(placed: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedlora.models.packaged import tiny

    base = AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=2, dtype=dtype)
    base.save_pretrained("base")
    AutoTokenizer.from_pretrained(tiny()).save_pretrained("base")
    own = ("model.path=base", "data.train=train.csv", "client.lr=1e-2", "out=run")
    main(["run", *SMALL, *own])
    main(["export", "run", "--to", "merged", "--merge"])
    before, after = (load_file(f"{name}/model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {dtype}
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("attention" in name for name in moved)  # a small ΔW is not lost in the rounding
    assert not any("embeddings" in name for name in moved)


@pytest.mark.parametrize("device", ["mps", "cuda:99", "meta", "nonsense"])
def test_a_device_that_is_not_here_is_refused_in_one_line(no_run: Callable[..., str], device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    assert "model.device: " in no_run(f"model.device={device}")


def test_a_folder_without_the_file_of_what_was_learnt_is_no_run(
    placed: Path, refused: Callable[..., str]
) -> None:
    main(["run", *SMALL, "data.train=train.csv", "out=run"])
    (placed / "run/task.json").unlink()
    assert "has no task.json" in refused("export", "run", "--to", "to")
    (placed / "run/task.json").write_text("{}")
    assert "task.json' is damaged" in refused("export", "run", "--to", "to")
