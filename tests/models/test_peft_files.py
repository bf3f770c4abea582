import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.adapter import Adapter, Pair
from fedlora.data import collate
from fedlora.errors import ModelError
from fedlora.models import Bank, Base, LoRA, fresh_adapter, load_adapter, merge, save_adapter, targets
from fedlora.trainer import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERY = ("bert", "bert-mlm", "roberta", "distilbert", "llama", "llama-cls", "gpt2", "gpt2-cls")
MIXED = ((3, 1, 5, 3), (2.0, 0.3, 1.7, 4.0, 2.0))
SOME = {"bert": "query", "roberta": "query", "distilbert": "q_lin"}


def batch(zoo: Any, base: Base) -> Any:
    return collate(zoo.rows(base, 5, 3), base.tokenizer.pad_token_id)


def ours(zoo: Any, base: Base, adapter: Adapter) -> Tensor:
    with torch.no_grad(), Bank(base, [adapter]):
        return base.logits(batch(zoo, base))


def theirs(zoo: Any, base: Base, model: Any) -> Tensor:
    rows = batch(zoo, base)
    with torch.no_grad():
        return model.eval()(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits


def same(base: Base, one: Tensor, other: Tensor, rows: Any, tolerance: float = 1e-5) -> bool:
    """Equal at every real token, relative to the largest logit."""
    gap = (one - other).abs() / one.abs().max()
    if base.kind == "instruction":
        gap = gap[rows.attention_mask.bool()]
    return bool(gap.max() < tolerance)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_plain_peft_loads_what_we_save_with_our_logits(
    zoo: Any, tmp_path: Path, name: str, head: bool
) -> None:
    base = zoo.base(name)
    adapter = zoo.adapter(base, *MIXED, head=head)
    save_adapter(adapter, base, tmp_path)
    model = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path))
    got, want, rows = theirs(zoo, base, model), ours(zoo, base, adapter), batch(zoo, base)
    assert same(base, want, got, rows)
    with torch.no_grad():
        assert not same(base, base.logits(rows), want, rows, 0.01)
    assert not any(p.requires_grad for p in model.parameters())  # ready for inference


@pytest.mark.parametrize("name", EVERY)
def test_what_we_save_comes_back_with_the_same_digest(zoo: Any, tmp_path: Path, name: str) -> None:
    base = zoo.base(name)
    adapter = zoo.adapter(base, (2, 1, 4, 8), (2.0, 0.5, 16 / 3, 1.7))
    save_adapter(adapter, base, tmp_path / "deep" / "er")
    back = load_adapter(tmp_path / "deep" / "er", base)
    assert zoo.gap(adapter, back) == 0
    assert {n: p.scale for n, p in back.pairs.items()} == pytest.approx(
        {n: p.scale for n, p in adapter.pairs.items()}, rel=1e-15
    )
    assert back.digest() == adapter.digest()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    scales=st.lists(st.floats(0.01, 300), min_size=3, max_size=3),
)
def test_any_mix_of_ranks_and_scales_comes_back(
    zoo: Any, tmp_path: Path, ranks: list[int], scales: list[float]
) -> None:
    if not hasattr(zoo, "kept"):
        zoo.kept = zoo.base("bert")
    base = zoo.kept
    adapter = zoo.adapter(base, ranks, scales)
    save_adapter(adapter, base, tmp_path)
    back = load_adapter(tmp_path, base)
    assert zoo.gap(adapter, back) == 0
    assert [p.scale for p in back.pairs.values()] == pytest.approx(
        [p.scale for p in adapter.pairs.values()], rel=1e-15
    )


def test_a_frozen_made_up_head_is_saved_since_a_plain_model_makes_its_own(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert-mlm")
    save_adapter(zoo.adapter(base, 2, head=False), base, tmp_path)
    back = load_adapter(tmp_path, base)
    assert {n.rsplit(".", 1)[0] for n in back.extra} == {"bert.pooler.dense", "classifier"}
    for name, value in base.head_state().items():
        assert torch.equal(back.extra[name], value)


def test_the_saved_config_says_rank_alpha_and_where_from(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    save_adapter(zoo.adapter(base, (4, 4, 2), 0.5), base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 2.0, "SEQ_CLS")
    assert config["base_model_name_or_path"] == base.path
    assert set(config["rank_pattern"].values()) == {2}
    assert set(config["alpha_pattern"].values()) == {1.0}
    assert sorted(config["target_modules"]) == sorted(targets(base, "all-linear"))
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ModelError, match="no LoRA pair"):
        save_adapter(Adapter({}, base.head_state()), base, tmp_path)


def test_factors_that_share_memory_can_be_saved(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    whole = torch.randn(6, 16)
    names = [n for n, shape in targets(base, "all-linear").items() if shape == (16, 16)][:3]
    adapter = Adapter({n: Pair(whole[2 * i : 2 * i + 2], whole.T[:, :2]) for i, n in enumerate(names)})
    save_adapter(adapter, base, tmp_path)
    back = load_adapter(tmp_path, base)
    assert Adapter(back.pairs).digest() == adapter.digest()


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
    if base.kind == "classification":
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
    rows = batch(zoo, base)
    assert len({p.scale for p in adapter.pairs.values()}) > 1
    assert len({p.rank for p in adapter.pairs.values()}) > 1
    assert same(base, theirs(zoo, base, model), ours(zoo, base, adapter), rows)
    again = tmp_path / "again"
    save_adapter(adapter, base, again)
    model = PeftModel.from_pretrained(zoo.plain(base), str(again))
    assert same(base, theirs(zoo, base, model), ours(zoo, base, adapter), rows)


def test_a_peft_adapter_without_our_made_up_pooler_can_be_used(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert-mlm")
    made_by_peft(zoo, base, tmp_path, target_modules=["query"])  # saves the classifier alone
    [(loss, _)] = evaluate(base, [load_adapter(tmp_path, base)], [zoo.rows(base, 3, 0)])
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
        {"use_dora": True},
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


@pytest.mark.parametrize("name", EVERY)
def test_a_merged_model_gives_the_adapter_s_logits(zoo: Any, tmp_path: Path, name: str) -> None:
    base = zoo.base(name)
    adapter = zoo.adapter(base, *MIXED)
    want, rows = ours(zoo, base, adapter), batch(zoo, base)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    merge(base, adapter)
    with torch.no_grad():
        assert same(base, want, base.logits(rows), rows)
    touched = {n for n, p in base.model.named_parameters() if not torch.equal(p, before[n])}
    assert touched == {f"{n}.weight" for n in adapter.pairs} | set(adapter.extra)
    base.model.save_pretrained(str(tmp_path))
    plain = type(base.model).from_pretrained(str(tmp_path))
    assert same(base, want, theirs(zoo, base, plain), rows)


def test_a_merged_bfloat16_model_is_rounded_once(zoo: Any) -> None:
    base = zoo.base("bert", dtype="bfloat16")
    adapter = zoo.adapter(zoo.base("bert"), 2)
    name, pair = next(iter(adapter.pairs.items()))
    before = base.model.get_submodule(name).weight.double()
    merge(base, adapter)
    exact = before + pair.scale * pair.B.double() @ pair.A.double()
    after = base.model.get_submodule(name).weight
    assert after.dtype == torch.bfloat16
    assert (
        torch.equal(after, exact.float().bfloat16())
        or (after - exact).abs().max() <= 2**-8 * exact.abs().max()
    )


def test_a_fresh_adapter_is_the_plain_model_with_our_head(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("roberta")
    shapes = targets(base, SOME["roberta"])
    adapter = fresh_adapter(base, shapes, LoRA().peer(0, 4, shapes), True)
    save_adapter(adapter, base, tmp_path)
    model = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path))
    rows = batch(zoo, base)
    with torch.no_grad():
        assert same(base, base.logits(rows), theirs(zoo, base, model), rows)
