import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.cli.main import main

# peft and transformers warn about each other; the command hides that, pytest's filters undo it.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[no-any-return]


def test_the_merged_model_is_the_adapted_one(finished: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedlora.models.packaged import tiny

    main(["export", str(finished), "--to", str(tmp_path / "adapter")])
    main(["export", str(finished), "--to", str(tmp_path / "merged"), "--merge"])
    plain = AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=2)
    adapted = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")))
    merged = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(adapted, merged, atol=1e-5)
    fresh = AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=2)
    assert not torch.allclose(adapted, logits(fresh), atol=1e-3)
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_verify_says_ok(finished: Path, capsys: Any) -> None:
    main(["verify", str(finished)])
    assert capsys.readouterr().out.startswith("ok: SHA-256")


@pytest.mark.parametrize("at", [9, 0.5, -1])
def test_verify_sees_a_flipped_byte(copied: Path, refused: Callable[..., str], at: float) -> None:
    path = copied / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(at * len(data)) if at == 0.5 else int(at)] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in refused("verify", str(copied))


def test_verify_sees_another_summary(copied: Path, refused: Callable[..., str]) -> None:
    import json

    summary = json.loads((copied / "summary.json").read_text())
    wrong = {**summary, "accuracy": summary["accuracy"] - 0.5}
    (copied / "summary.json").write_text(json.dumps(wrong))
    assert "summary says" in refused("verify", str(copied))


@pytest.mark.parametrize("verb", ["export", "verify"])
def test_looking_at_a_run_changes_nothing(copied: Path, tmp_path: Path, verb: str) -> None:
    """The run may be going on: its last lines are written before their checkpoint is."""
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (copied / name).open("a") as file:
            file.write('{"round": 2, "client": 0}\n')
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    main([verb, str(copied), *(["--to", str(tmp_path / "to")] if verb == "export" else [])])
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_report_prints_and_writes(finished: Path, tmp_path: Path, capsys: Any) -> None:
    main(["report", str(finished), str(finished), "--to", str(tmp_path / "r.html")])
    said = capsys.readouterr().out
    assert "FlexLoRA" in said
    assert "r.html" in "".join(said.split())


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of FedSA-LoRA, whose clients keep B and the head."""
    out = tmp_path_factory.mktemp("personal") / "run"
    small = ("model=tiny", "data=tiny", "clients=3", "rounds=2", "ranks=4", "+data.source.rows=48")
    main(["run", *small, "strategy=fedsalora", f"out={out}"])
    return out


def test_a_client_s_own_adapter_is_what_it_evaluated(personal: Path, tmp_path: Path) -> None:
    import json

    from omegaconf import DictConfig, OmegaConf

    from fedlora.config.translate import run_spec
    from fedlora.core.adapter import Adapter
    from fedlora.core.messages import Task
    from fedlora.models import by_peft
    from fedlora.runner.assemble import assemble
    from fedlora.runner.load_models import load_base
    from fedlora.training.evaluation import evaluate

    main(["export", str(personal), "--client", "1", "--to", str(tmp_path / "one")])
    config = OmegaConf.load(personal / "config.yaml")
    assert isinstance(config, DictConfig)
    job = assemble(run_spec(config))
    kept = job.runtime._split(1)[1]
    plain = by_peft(load_base(job.spec.model, job.dataset, job.spec.seed), tmp_path / "one")
    [(loss, right)] = evaluate(plain, [Task(Adapter({}))], [kept])
    said = json.loads((personal / "summary.json").read_text())["own"]["1"]
    assert (loss, right) == (pytest.approx(said["local_loss"], abs=1e-4), said["local_accuracy"])


def test_a_personal_run_leaves_no_adapter_and_says_so(personal: Path, refused: Callable[..., str]) -> None:
    assert not (personal / "adapter").exists()
    assert "personal" in refused("verify", str(personal))
    to = str(personal.parent / "exported")
    assert "--client N" in refused("export", str(personal), "--to", to)
    assert "leave --merge out" in refused("export", str(personal), "--to", to, "--client", "1", "--merge")
    assert not Path(to).exists()


@pytest.mark.parametrize("client", ["7", "-1"])
def test_a_client_that_is_not_there_is_refused(
    personal: Path, refused: Callable[..., str], tmp_path: Path, client: str
) -> None:
    assert "0 to 2" in refused("export", str(personal), "--client", client, "--to", str(tmp_path / "to"))


def test_a_client_of_one_global_model_has_no_adapter_of_its_own(
    finished: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert "FlexLoRA" in refused("export", str(finished), "--client", "0", "--to", str(tmp_path / "to"))
