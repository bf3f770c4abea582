"""`lora.head=last`: the layer that gives the output is trained and sent, what lies before it stays."""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.errors import ConfigError
from fedlora.models.packaged import tiny

pytestmark = pytest.mark.slow  # whole runs

LAST = "classifier"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model without its pooler, which then is made up and a part of the head."""
    folder = tmp_path_factory.mktemp("encoder")
    shutil.copytree(tiny(), folder, dirs_exist_ok=True)
    [file] = folder.glob("*.safetensors")
    kept = {name: value for name, value in load_file(file).items() if "pooler" not in name}
    save_file(kept, file, {"format": "pt"})
    return f"model.path={folder}"


def heads(run: Any) -> dict[str, torch.Tensor]:
    found = load_file(run.path / "adapter" / "adapter_model.safetensors")
    return {name: value for name, value in found.items() if "lora_" not in name}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of one library about another
def test_only_the_last_layer_of_the_head_is_trained_and_sent_and_all_of_it_is_saved(
    run: Any, encoder: str
) -> None:
    from fedlora.saved_runs.export import verify

    last, all_of_it, none = (
        run(encoder, f"lora.head={head}", "rounds=1") for head in ("last", "train", "freeze")
    )
    before, after, trained = heads(none), heads(last), heads(all_of_it)
    assert before.keys() == after.keys() == trained.keys()
    assert any("pooler" in name for name in before)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if LAST in name
    }
    assert all(not torch.equal(before[name], trained[name]) for name in before)
    sent = [one.metrics[0]["bytes_up"] for one in (none, last, all_of_it)]
    extra = sum(value.nbytes for name, value in before.items() if LAST in name)
    assert 3 * extra <= sent[1] - sent[0] < sent[2] - sent[0]
    assert "ok" in verify(last.path)


def test_an_adapter_brings_the_layers_that_are_not_trained(run: Any, encoder: str) -> None:
    first = run(encoder, "rounds=1")
    then = run(encoder, "lora.head=last", "rounds=1", f"lora.adapter={first.path / 'adapter'}")
    for name, value in heads(first).items():
        assert torch.equal(heads(then)[name], value) == (LAST not in name)


def test_another_word_is_refused(run: Any) -> None:
    with pytest.raises(ConfigError, match="expected train, last or freeze"):
        run("lora.head=first")
