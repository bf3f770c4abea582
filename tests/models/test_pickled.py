"""Weights are safetensors unless the user insists; code in a model's folder is never run."""

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ModelError
from fedlora.models import load, load_adapter

LABELS = ("a", "b", "c")


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


@pytest.fixture
def pickled(zoo: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A model's folder with its weights in pytorch_model.bin, in one file or in shards."""

    def go(name: str, sharded: bool = False) -> Path:
        from safetensors.torch import load_file

        folder = Path(shutil.copytree(zoo.folder(name), tmp_path / f"{name}-{sharded}"))
        weights = folder / "model.safetensors"
        file = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
        tensors = load_file(weights)
        torch.save(tensors, folder / file)
        if sharded:
            index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, file)}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        weights.unlink()
        return folder

    return go


@pytest.mark.parametrize(("name", "kind"), [("bert", "classification"), ("llama", "instruction")])
@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_need_the_user_s_word(
    zoo: Any, pickled: Callable[..., Path], name: str, kind: Any, sharded: bool
) -> None:
    folder = pickled(name, sharded)
    with pytest.raises(ModelError) as caught:
        load(folder, kind, LABELS if kind == "classification" else ())
    assert "\n" not in str(caught.value)
    assert "model.allow_pickle=true" in str(caught.value)
    assert str(folder) in str(caught.value)
    given = load(folder, kind, LABELS if kind == "classification" else (), allow_pickle=True)
    for key, value in zoo.base(name).model.state_dict().items():
        assert torch.equal(value, given.model.state_dict()[key]), key


def test_a_pickle_is_not_opened_to_find_out(zoo: Any, pickled: Callable[..., Path]) -> None:
    folder = pickled("bert")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"allow_pickle"):
        load(folder, "classification", LABELS)


def test_safetensors_are_taken_where_there_are_both(zoo: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo.folder("bert"), tmp_path / "both"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for allow in (False, True):
        load(folder, "classification", LABELS, allow_pickle=allow)


def test_a_name_of_the_hub_too(
    zoo: Any, pickled: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Of its cache, as it lies there after a download."""
    snapshot = tmp_path / "hub" / "models--some--one" / "snapshots" / ("0" * 40)
    shutil.copytree(pickled("bert"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"model\.path.*some/one") as caught:
        load("some/one", "classification", LABELS)
    assert "allow_pickle=true" in str(caught.value)
    assert load("some/one", "classification", LABELS, allow_pickle=True).heads == ("classifier",)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_s_folder_is_never_run(
    zoo: Any, tmp_path: Path, file: str, monkeypatch: Any, capsys: Any
) -> None:
    folder = Path(shutil.copytree(zoo.folder("bert"), tmp_path / "m"))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    found = json.loads((folder / file).read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    classes["AutoModelForSequenceClassification"] = "evil.Evil"
    found |= {"auto_map": classes, **({"model_type": "evil"} if file == "config.json" else {})}
    if file != "config.json":
        found["tokenizer_class"] = "Evil"
    (folder / file).write_text(json.dumps(found))
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("somebody was asked"))
    with contextlib.suppress(ModelError):
        load(folder, "classification", LABELS)
    assert not ran.exists()


def test_a_pickled_adapter_is_refused(zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"lora\.adapter: expected adapter_model\.safetensors"):
        load_adapter(tmp_path, zoo.base("bert"))
