import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file

from fedlora.errors import FedLoraError

FILES = {
    "config.yaml",
    "data.json",
    "metrics.jsonl",
    "clients.jsonl",
    "summary.json",
    "adapter",
    "checkpoint",
}
SUMMARY = {
    "accuracy",
    "loss",
    "initial",
    "rounds",
    "clients",
    "ranks",
    "seed",
    "bytes_down",
    "bytes_up",
    "startup_seconds",
    "wall_seconds",
    "peak_memory_mb",
    "adapter_sha256",
    "versions",
}


def adapter(found: Any) -> dict[str, torch.Tensor]:
    return load_file(found.path / "adapter" / "adapter_model.safetensors")


def test_what_a_run_leaves(flex: Any) -> None:
    assert {path.name for path in flex.path.iterdir()} >= FILES
    assert flex.summary.keys() >= SUMMARY
    data = json.loads((flex.path / "data.json").read_text())
    assert [(c["client"], c["rank"]) for c in data["clients"]] == [(0, 2), (1, 4), (2, 2)]
    assert all(sum(c["labels"]) == c["rows"] > 0 for c in data["clients"])
    assert {c["client"]: c["rows"] for c in data["clients"]} == {
        c["client"]: c["examples"] for c in flex.clients
    }
    assert "tail_kept" in flex.metrics[-1]
    assert flex.summary["ranks"] == [2, 4]
    assert flex.summary["peak_memory_mb"] > 50
    assert [m["round"] for m in flex.metrics] == [1, 2, 3]
    assert [(c["round"], c["client"], c["rank"]) for c in flex.clients] == [
        (t, c, r) for t in (1, 2, 3) for c, r in enumerate((2, 4, 2))
    ]
    for name in ("bytes_down", "bytes_up", "dropped"):
        assert flex.summary[name] == sum(m[name] for m in flex.metrics)
    assert flex.summary["accuracy"] == flex.metrics[-1]["accuracy"]
    assert max(m["aggregation_error"] for m in flex.metrics) < 1e-6
    assert flex.sha == flex.summary["adapter_sha256"]
    assert not list(flex.path.rglob("*.tmp"))


def test_training_moves_the_accuracy(flex: Any) -> None:
    assert flex.metrics[-1]["train_loss"] < flex.metrics[0]["train_loss"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers about each other
def test_a_stranger_loads_the_adapter_with_plain_peft(flex: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedlora.data.made import tiny
    from fedlora.models.packaged import tiny as tiny_model

    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model(), num_labels=2)
    model = PeftModel.from_pretrained(plain, str(flex.path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    dataset = tiny(rows=48, test_rows=16, seed=0)
    right, loss = 0, 0.0
    for row in dataset.test:
        with torch.no_grad():
            logits = model(**tokenizer(row.source, return_tensors="pt")).logits
        target = dataset.labels.index(row.target)
        right += int(logits.argmax()) == target
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor([target])))
    assert right / 16 == pytest.approx(flex.summary["accuracy"])
    assert loss / 16 == pytest.approx(flex.summary["loss"], abs=1e-4)


def test_the_same_run_twice_is_the_same_adapter(flex: Any, run: Callable[..., Any]) -> None:
    again = ("strategy=flexlora", "ranks=[2,4]", "rounds=3", "client.steps=12")
    second = run(*again)
    assert second.sha == flex.sha
    assert run(*again, "seed=1").sha != flex.sha
    wall = ("seconds", "epsilon")
    strip = [{k: v for k, v in m.items() if k not in wall} for m in flex.metrics]
    assert strip == [{k: v for k, v in m.items() if k not in wall} for m in second.metrics]


def test_grouping_changes_rounding_only(flex: Any, run: Callable[..., Any]) -> None:
    alone = run("strategy=flexlora", "ranks=[2,4]", "rounds=1", "client.steps=2", "engine.fuse=1")
    fused = run("strategy=flexlora", "ranks=[2,4]", "rounds=1", "client.steps=2")
    one, many = adapter(alone), adapter(fused)
    assert one.keys() == many.keys()
    for name in {n.rsplit(".lora_", 1)[0] for n in one if ".lora_" in n}:
        # Singular vectors may turn; their product may not.
        deltas = [found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"] for found in (one, many)]
        assert torch.allclose(*deltas, atol=1e-5), name
    for name in one:
        if ".lora_" not in name:
            assert torch.allclose(one[name], many[name], atol=1e-5), name


def test_the_config_alone_gives_the_run_again(flex: Any, result: Any, tmp_path: Path) -> None:
    from fedlora.cli.run_job import run_job

    config = OmegaConf.load(flex.path / "config.yaml")
    config.out = str(tmp_path / "again")
    assert "${" not in (flex.path / "config.yaml").read_text()
    run_job(config, Console(file=StringIO()))
    assert result(tmp_path / "again").sha == flex.sha


def test_ffalora_sends_no_a_and_keeps_it(run: Callable[..., Any]) -> None:
    ffa, both = run("strategy=ffalora", "rounds=1"), run("rounds=1")
    assert ffa.metrics[0]["aggregation_error"] < 1e-6
    assert both.metrics[0]["aggregation_error"] > 1e-3
    assert ffa.metrics[0]["bytes_up"] < both.metrics[0]["bytes_up"]
    assert abs(ffa.metrics[0]["bytes_down"] - both.metrics[0]["bytes_down"]) < 100
    other = run("strategy=ffalora", "rounds=2")
    for name, value in adapter(ffa).items():
        if "lora_A" in name:
            assert torch.equal(value, adapter(other)[name])


@pytest.fixture
def payloads(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of what each reply carries."""
    import fedlora.rounds.aggregation.base as module

    seen: list[set[str]] = []
    read = module.read_update

    def watched(reply: Any, *rest: Any) -> Any:
        seen.append(set(reply.content.array_records["arrays"]))
        return read(reply, *rest)

    monkeypatch.setattr(module, "read_update", watched)
    return seen


def test_a_frozen_head_is_not_sent_and_does_not_move(
    run: Callable[..., Any], payloads: list[set[str]]
) -> None:
    first = run("lora.head=freeze", "rounds=1")
    assert payloads
    assert not [name for names in payloads for name in names if not name.endswith((".A", ".B"))]
    second = run("lora.head=freeze", "rounds=2", "client.lr=5e-2")
    heads = [{n: t for n, t in adapter(r).items() if ".lora_" not in n} for r in (first, second)]
    assert heads[0].keys() == heads[1].keys() != set()
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_the_head_alone_can_be_trained(run: Callable[..., Any], payloads: list[set[str]]) -> None:
    found = run("lora.targets=[]", "rounds=1")
    assert found.summary["adapter_sha256"] is None
    assert not (found.path / "adapter").exists()
    assert all(not name.endswith((".A", ".B")) for names in payloads for name in names)
    assert "aggregation_error" not in found.metrics[0]


def test_each_client_can_evaluate_what_it_is_sent(run: Callable[..., Any]) -> None:
    found = run("evaluate.clients=true", "rounds=1")
    assert all(0 <= line["local_accuracy"] <= 1 for line in found.clients)
    own = [line["local_accuracy"] for line in found.clients]
    assert found.metrics[0]["local_accuracy"] == pytest.approx(sum(own) / 3)
    assert "local_accuracy" in found.summary


def test_a_client_of_one_row_has_none_to_keep_back(run: Callable[..., Any]) -> None:
    found = run("evaluate.clients=true", "rounds=1", "clients=48", "data.partition=iid", "data.min_rows=1")
    assert "local_accuracy" not in found.metrics[0]  # and no NaN anywhere: `Result` refuses it


def test_each_update_can_be_evaluated(run: Callable[..., Any]) -> None:
    found = run("evaluate.updates=true", "rounds=1")
    assert all(0 <= line["test_accuracy"] <= 1 and line["test_loss"] > 0 for line in found.clients)


def test_evaluation_every_second_round_and_at_the_end(run: Callable[..., Any]) -> None:
    found = run("evaluate.every=2", "rounds=3")
    assert [m["round"] for m in found.metrics if "accuracy" in m] == [2, 3]
    assert "accuracy" in found.summary
    never = run("evaluate.every=0", "rounds=1")
    assert "accuracy" not in never.metrics[0]


def test_more_clients_than_there_are_takes_all(run: Callable[..., Any]) -> None:
    assert run("clients_per_round=99", "rounds=1").metrics[0]["clients"] == 3


def test_a_run_can_start_from_another_runs_adapter(flex: Any, run: Callable[..., Any]) -> None:
    found = run("strategy=flexlora", f"lora.adapter={flex.path / 'adapter'}", "rounds=1", "ranks=4")
    assert found.summary["initial"]["loss"] == pytest.approx(flex.summary["loss"], abs=1e-4)


def test_a_frozen_head_stays_frozen_when_an_adapter_brings_one(
    flex: Any, run: Callable[..., Any], payloads: list[set[str]]
) -> None:
    run(
        "strategy=flexlora",
        f"lora.adapter={flex.path / 'adapter'}",
        "rounds=1",
        "ranks=4",
        "lora.head=freeze",
    )
    assert not [name for names in payloads for name in names if not name.endswith((".A", ".B"))]


def test_a_run_without_one_good_update_fails_and_leaves_json(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "diverged"
    with pytest.raises(FedLoraError, match=r"no client sent a good update.*clients\.jsonl"):
        run("client.lr=1e30", "client.head_lr=1e30", "rounds=1", "client.clip=null", out=out)
    lines = [json.loads(line) for line in (out / "clients.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines} == {"dropped"}
    assert not (out / "summary.json").exists()


def test_mixed_ranks_larger_than_the_layers(run: Callable[..., Any]) -> None:
    found = run("strategy=flexlora", "ranks=[1,40]", "rounds=2")
    assert max(m["aggregation_error"] for m in found.metrics) < 1e-6


def command(words: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedlora.cli.main", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.slow
def test_the_hash_seed_does_not_matter(flex: Any, base: tuple[str, ...], result: Any, tmp_path: Path) -> None:
    again = ("strategy=flexlora", "ranks=[2,4]", "rounds=3", "client.steps=12", f"out={tmp_path / 'r'}")
    done = command(
        ["run", *base, *again], PYTHONHASHSEED="12345", OMP_NUM_THREADS=str(torch.get_num_threads())
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "r").sha == flex.sha
    lines = [line for line in done.stdout.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert done.stderr == ""


@pytest.mark.slow
def test_a_sweep_makes_a_folder_a_run(base: tuple[str, ...], tmp_path: Path) -> None:
    where = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = command(["run", "-m", *base, "rounds=1", "strategy=fedit,flexlora", where])
    assert done.returncode == 0, done.stderr
    found = sorted((tmp_path / "sweep").rglob("summary.json"))
    assert sorted(json.loads(path.read_text())["strategy"] for path in found) == ["fedit", "flexlora"]


@pytest.mark.slow
def test_a_wrong_key_in_a_sweep_is_one_line_too(base: tuple[str, ...], tmp_path: Path) -> None:
    done = command(["run", "-m", *base, "strategi=fedit,flexlora", f"hydra.sweep.dir={tmp_path}"])
    assert done.returncode == 2
    assert "strategi" in done.stderr
    assert len(done.stderr.splitlines()) == 1
