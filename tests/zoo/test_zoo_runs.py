"""Architectures through the command line: resumed, verified, in bfloat16, private, each update evaluated."""

import json
import math
import warnings
from pathlib import Path

import pytest
from zoo_models import checkpoint, lines
from zoo_table import ZOO

from fedlora.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]
ONE_BY_ONE = "clients train one by one: "
LEFT_OUT = "lora.targets=all-linear leaves out"
RESUMED = [
    pytest.param(name, marks=() if name == "bert" else pytest.mark.slow)
    for name, entry in ZOO.items()
    if entry.trained
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.report.write_report", lambda runs, to, *more: to)


def words(name: str, root: Path, folder: Path) -> list[str]:
    """What a run of an architecture is asked for, with rows of its own in the folder."""
    entry = ZOO[name]
    for file, number in (("train", 12), ("test", 3)):
        records = [json.dumps(line) for line in lines(entry, number, number)]
        (folder / f"{file}.jsonl").write_text("\n".join(records) + "\n")
    columns = {"classification": "text label", "instruction": "prompt response"}[entry.kind].split()
    return [
        "run",
        "model=hub",
        f"model.path={checkpoint(entry, root / name)}",
        f"lora.targets={entry.targets if isinstance(entry.targets, str) else json.dumps(entry.targets)}",
        "data=files",
        f"data.train={folder}/train.jsonl",
        f"data.test={folder}/test.jsonl",
        *(f"data.{column}={column}" for column in columns),
        "clients=3",
        "ranks=[1,2]",
    ]


def run(name: str, root: Path, verb: list[str]) -> None:
    """Run it; it says all that the table says of the architecture, once, and nothing else."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        main(verb)
    said = [str(one.message) for one in warned]
    assert sum(line.startswith(ONE_BY_ONE) for line in said) == ("fused" in ZOO[name].refused), said
    fed = sum(str(root / name) in line for line in said)
    assert fed in (0, len(ZOO[name].fed)), said  # a process loads a model once
    assert sum(line.startswith(LEFT_OUT) for line in said) == bool(ZOO[name].left_out), said
    others = [line for line in said if str(root / name) not in line]
    assert all(line.startswith((ONE_BY_ONE, LEFT_OUT)) for line in others), others


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_in_the_bytes_of_the_run_that_went_through_and_is_verified(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    asked = [*words(name, root, tmp_path), "strategy=flexlora"]
    run(name, root, [*asked, "rounds=2", f"out={tmp_path}/whole"])
    run(name, root, [*asked, "rounds=1", f"out={tmp_path}/cut"])
    run(name, root, ["run", f"resume={tmp_path}/cut", "rounds=2"])
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        main(["verify", f"{tmp_path}/whole"])
    assert capsys.readouterr().out.startswith("ok: SHA-256")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["bert", "t5-cls", "bart-cls", "modernbert", "llama", "gemma3-mm", "mixtral", "deepseek-v3", "mamba2"],
)
def test_a_run_in_bfloat16_is_verified(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    asked = [*words(name, root, tmp_path), "strategy=fedit", "ranks=2", "model.dtype=bfloat16", "rounds=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        main([*asked, f"out={tmp_path}/run"])
        capsys.readouterr()
        main(["verify", f"{tmp_path}/run"])
    assert capsys.readouterr().out.startswith("ok: SHA-256")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-cls", "bart-cls", "phi3-longrope", "convbert"])
def test_a_private_run_keeps_every_client(root: Path, tmp_path: Path, name: str) -> None:
    asked = [*words(name, root, tmp_path), "strategy=ffalora", "ranks=2", "rounds=1"]
    asked += ["privacy=dp_sgd", "client.batch_size=2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        main([*asked, f"out={tmp_path}/run"])
    log = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert all(line["epsilon"] > 0 for line in log)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta-v2", "xlnet"])
def test_each_update_of_a_model_that_cannot_tell_clients_apart_is_evaluated(
    root: Path, tmp_path: Path, name: str
) -> None:
    asked = [*words(name, root, tmp_path), "strategy=flexlora", "evaluate.updates=true", "rounds=1"]
    run(name, root, [*asked, f"out={tmp_path}/run"])
    log = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    losses = {line["test_loss"] for line in log}
    assert len(log) == len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
