import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example, collate
from fedlora.errors import ConfigError, ModelError
from fedlora.models import load, packaged
from fedlora.training.evaluation import evaluate

LABELS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ("classifier",)),
        ("bert-mlm", ("bert.pooler", "classifier")),
        ("roberta", ("classifier",)),
        ("distilbert", ("classifier", "pre_classifier")),
        ("llama-cls", ("score",)),
        ("gpt2-cls", ("score",)),
        ("llama", ()),
        ("gpt2", ()),
    ],
)
def test_the_heads_are_the_encoder_s_siblings_and_what_was_made_up(
    zoo: Any, name: str, heads: tuple[str, ...]
) -> None:
    base = zoo.base(name)
    assert base.heads == heads
    assert {n.rsplit(".", 1)[0].startswith(heads) for n in base.head_state()} == ({True} if heads else set())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


@pytest.mark.parametrize("name", ["bert-mlm", "roberta", "distilbert", "llama-cls"])
def test_a_made_up_head_follows_the_seed_and_nothing_else(zoo: Any, name: str) -> None:
    torch.manual_seed(1)
    one = zoo.base(name, seed=3).head_state()
    torch.manual_seed(2)
    two, three = zoo.base(name, seed=3).head_state(), zoo.base(name, seed=4).head_state()
    for key, value in one.items():
        assert torch.equal(value, two[key])
        if value.ndim > 1:
            assert value.std() > 0.1  # the model's initializer_range is 0.3
            assert not torch.equal(value, three[key])
        else:
            assert not value.any()


def test_what_the_checkpoint_holds_is_kept(zoo: Any, tmp_path: Path) -> None:
    first = zoo.base("roberta", seed=3)
    first.model.save_pretrained(str(tmp_path))
    first.tokenizer.save_pretrained(str(tmp_path))
    again = load(tmp_path, "classification", LABELS, seed=9)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
    assert again.heads == ("classifier",)
    assert again.model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_checkpoint_with_a_head_for_other_labels_gets_a_new_head_or_a_clear_line(
    zoo: Any, tmp_path: Path
) -> None:
    first = zoo.base("bert")
    first.model.save_pretrained(str(tmp_path))
    first.tokenizer.save_pretrained(str(tmp_path))
    message = ""
    try:
        base = load(tmp_path, "classification", [*LABELS, "d", "e"])
    except ModelError as error:
        message = str(error)
    if message:
        assert "label" in message
    else:
        assert base.model.classifier.weight.shape[0] == 5
        assert base.heads == ("classifier",)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "gpt2-cls"])
def test_a_row_may_be_as_long_as_the_table_of_positions_and_no_longer(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    assert base.room is not None
    target = 0 if base.task.labelled else [5] * base.room
    whole = Example([5] * base.room, target)
    base.check_lengths([whole])
    assert base.losses(collate([whole], base.pad_id))[0].isfinite()
    with pytest.raises(ConfigError, match=f"max_length={base.room}"):
        base.check_lengths([whole, Example([5] * (base.room + 1), target)])
    with pytest.raises((IndexError, RuntimeError)):
        base.losses(collate([Example([5] * (base.room + 1), target)], base.pad_id))


def test_a_model_of_rotary_positions_takes_rows_of_any_length(zoo: Any) -> None:
    base = zoo.base("llama")
    assert base.room is None
    base.check_lengths([Example([5] * 100, [5] * 100)])


def test_dropout_is_off(zoo: Any) -> None:
    base = zoo.base("bert")
    assert base.model.config.hidden_dropout_prob > 0
    batch = collate(zoo.rows(base, 4, 0), 0)
    assert torch.equal(base.logits(batch), base.logits(batch))


def test_the_pad_token_falls_back_to_the_end_token(zoo: Any) -> None:
    base = zoo.base("gpt2")
    assert base.tokenizer.pad_token == "<end>"
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id == 2
    assert zoo.base("bert").tokenizer.pad_token == "<pad>"


def test_a_tokenizer_with_neither_pad_nor_end_is_refused(zoo: Any, tmp_path: Path) -> None:
    shutil.copytree(zoo.folder("bert"), tmp_path / "m")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / file).unlink()
    zoo.tokenizer(pad=None, eos=None).save_pretrained(str(tmp_path / "m"))
    with pytest.raises(ModelError, match="pad"):
        load(tmp_path / "m", "classification", LABELS)


@pytest.mark.parametrize("name", ["llama-cls", "gpt2-cls"])
def test_padding_changes_no_row_even_if_config_and_tokenizer_name_other_pads(
    zoo: Any, tmp_path: Path, name: str
) -> None:
    source = zoo.base(name).path
    shutil.copytree(source, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": 7}))
    for base in (zoo.base(name), load(tmp_path / "m", "classification", LABELS)):
        rows, bare = [Example([5, 9], 0), Example([8, 4, 5, 6, 10, 11], 1)], Adapter({})
        together = evaluate(base, [Task(bare), Task(bare)], [rows[:1], rows[1:]])
        alone = [evaluate(base, [Task(bare)], [[row]])[0] for row in rows]
        assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_losses_are_each_row_s_own_mean(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    rows = zoo.rows(base, 6, 0)
    losses, right = base.losses(collate(rows, base.tokenizer.pad_token_id))
    for row, loss, hit in zip(rows, losses, right, strict=True):
        logits = base.model(input_ids=torch.tensor([row.input_ids])).logits[0]
        target = torch.tensor(row.target)
        if base.task.generates:
            logits, target = logits[:-1][target[1:] != -100], target[1:][target[1:] != -100]
        torch.testing.assert_close(loss, F.cross_entropy(logits, target), rtol=1e-9, atol=1e-9)
        assert hit == pytest.approx((logits.argmax(-1) == target).double().mean().item())


def one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_a_folder_that_is_none_is_refused_in_one_line(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "nowhere", "classification", LABELS)
    one_line(caught.value, "model.path: expected a folder", "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "empty", "instruction")
    one_line(caught.value, "model.path: expected a folder", "empty")


@pytest.mark.parametrize("kind", ["broken config", "broken weights", "no weights", "no tokenizer"])
def test_a_damaged_folder_is_refused_in_one_line(zoo: Any, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(zoo.folder("bert"), folder)
    if kind == "broken config":
        (folder / "config.json").write_text("{")
    elif kind == "broken weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(ModelError) as caught:
        load(folder, "classification", LABELS)
    one_line(caught.value, "model.path", str(folder))


@pytest.mark.parametrize("dtype", ["double precision", "int8", "float33", "nn", "complex64"])
def test_another_dtype_is_refused(zoo: Any, dtype: str) -> None:
    with pytest.raises(
        ModelError, match=rf"model\.dtype: expected float32, bfloat16, float64 or auto, got '{dtype}'"
    ):
        zoo.base("bert", dtype=dtype)


def test_a_gpu_that_is_not_there_is_refused(zoo: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match=r"model\.device: 'cuda:1' was asked for, torch sees no GPU"):
        zoo.base("bert", device="cuda:1")


def test_a_device_that_torch_does_not_know_is_refused(zoo: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.device"):
        zoo.base("bert", device="gpu")


def test_an_encoder_cannot_follow_instructions(zoo: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load(zoo.folder("distilbert"), "instruction")
    one_line(caught.value, "distilbert")


def test_a_bfloat16_base_gives_float32_logits_and_heads(zoo: Any) -> None:
    base = zoo.base("bert", dtype="bfloat16")
    assert base.model.dtype == torch.bfloat16
    assert base.logits(collate(zoo.rows(base, 2, 0), 0)).dtype == torch.float32
    assert {t.dtype for t in base.head_state().values()} == {torch.float32}
    base.head_state()["classifier.weight"].zero_()
    assert base.model.classifier.weight.any()


def test_the_packaged_tiny_model_is_made_once_and_alike(tmp_path: Path, monkeypatch: Any) -> None:
    digests = []
    for cache in ("one", "two"):
        monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / cache))
        folder = Path(packaged.tiny())
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert packaged.tiny() == str(folder)
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
        assert [p.name for p in (tmp_path / cache).iterdir()] == [folder.name]  # nothing temporary is left
        digests.append((folder / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]
    base = load(folder, "classification", ("x", "y"))
    assert base.heads == ("classifier",)
    assert base.tokenizer("hé")["input_ids"] != base.tokenizer("he")["input_ids"]


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_a_packaged_model_that_is_not_installed_says_how(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"not installed: pip install"):
        getattr(packaged, name)()
