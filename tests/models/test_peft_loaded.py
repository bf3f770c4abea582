import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from fedlora.core.messages import Task
from fedlora.errors import ModelError
from fedlora.models import Base, load_adapter, save_adapter
from fedlora.training.evaluation import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PATTERNS: dict[str, dict[str, Any]] = {
    "bert": {
        "target_modules": ["query", "value", "intermediate.dense"],
        "rank_pattern": {"query": 5, "layer.1.attention.self.value": 1},
        "alpha_pattern": {"intermediate.dense": 7, "bert.encoder.layer.0.attention.self.query": 3},
    },
    "roberta": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layer\.[0]\..*\.dense": 2},
        "alpha_pattern": {"output.dense": 1},
    },
    "llama": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 6},
        "alpha_pattern": {"down_proj": 9},
    },
    "llama-cls": {"target_modules": "all-linear", "rank_pattern": {"v_proj": 6}},
    "gpt2": {
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "fan_in_fan_out": True,
        "rank_pattern": {"mlp.c_proj": 2},
        "alpha_pattern": {"h.1.attn.c_proj": 40},
    },
}  # fmt: skip


def made_by_peft(zoo: Any, base: Base, folder: Path, **settings: Any) -> Any:
    """A PEFT model with random factors, saved."""
    if base.task.new_head:
        settings = {"task_type": TaskType.SEQ_CLS} | settings
    else:
        settings = {"task_type": TaskType.CAUSAL_LM} | settings
    torch.manual_seed(11)
    model = get_peft_model(zoo.plain(base), LoraConfig(r=3, lora_alpha=8, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_adapter_made_by_peft_gives_peft_s_logits(
    zoo: Any, tmp_path: Path, name: str, rslora: bool
) -> None:
    base = zoo.base(name)
    model = made_by_peft(zoo, base, tmp_path, use_rslora=rslora, **PATTERNS[name])
    adapter = load_adapter(tmp_path, base)
    rows = zoo.batch(base)
    assert len({p.scale for p in adapter.pairs.values()}) > 1
    assert len({p.rank for p in adapter.pairs.values()}) > 1
    assert zoo.same(base, zoo.theirs(base, model), zoo.ours(base, adapter), rows)
    again = tmp_path / "again"
    save_adapter(adapter, base, again)
    model = PeftModel.from_pretrained(zoo.plain(base), str(again))
    assert zoo.same(base, zoo.theirs(base, model), zoo.ours(base, adapter), rows)


def test_a_peft_adapter_without_our_made_up_pooler_can_be_used(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert-mlm")
    made_by_peft(zoo, base, tmp_path, target_modules=["query"])  # saves the classifier alone
    [(loss, _)] = evaluate(base, [Task(load_adapter(tmp_path, base))], [zoo.rows(base, 3, 0)])
    assert loss > 0


def test_a_half_precision_adapter_is_loaded_in_float32(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    save_adapter(zoo.adapter(base, 2), base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    assert {t.dtype for _, t in load_adapter(tmp_path, base).tensors()} == {torch.float32}


@pytest.mark.parametrize(
    "more",
    [
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["query", "word_embeddings"]},
        {"modules_to_save": ["word_embeddings"]},
    ],
    ids=str,
)
def test_more_than_plain_lora_is_refused(zoo: Any, tmp_path: Path, more: dict[str, Any]) -> None:
    base = zoo.base("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made_by_peft(zoo, base, tmp_path, **{"target_modules": ["query"], **more})
    with pytest.raises(ModelError):
        load_adapter(tmp_path, base)


def test_lora_that_wakes_up_on_invocation_tokens_is_refused(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("llama")
    made_by_peft(zoo, base, tmp_path, target_modules=["q_proj"], alora_invocation_tokens=[4, 5])
    with pytest.raises(ModelError):
        load_adapter(tmp_path, base)


def test_a_folder_without_a_lora_adapter_is_refused(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path, base)
    model = get_peft_model(
        zoo.plain(base), IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["key"], feedforward_modules=[])
    )
    model.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(ModelError):
        load_adapter(tmp_path / "ia3", base)


def test_an_adapter_of_another_model_is_refused_by_name(zoo: Any, tmp_path: Path) -> None:
    llama = zoo.base("llama")
    save_adapter(zoo.adapter(llama, 2), llama, tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.0"):
        load_adapter(tmp_path, zoo.base("bert"))


def test_a_damaged_adapter_is_refused(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    save_adapter(zoo.adapter(base, 2), base, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {n: t for n, t in tensors.items() if not n.endswith("layer.0.attention.self.query.lora_B.weight")},
        file,
    )
    with pytest.raises(ModelError, match="query"):
        load_adapter(tmp_path / "half", base)
    file.unlink()
    with pytest.raises(ModelError):
        load_adapter(tmp_path / "half", base)
