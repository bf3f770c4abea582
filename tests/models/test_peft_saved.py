import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from fedlora.core.adapter import Adapter, Pair
from fedlora.errors import ModelError
from fedlora.models import LoRA, fresh_adapter, load_adapter, merge, save_adapter, targets

pytestmark = [
    pytest.mark.slow,  # every architecture
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EVERY = ("bert", "bert-mlm", "roberta", "distilbert", "llama", "llama-cls", "gpt2", "gpt2-cls")
MIXED = ((3, 1, 5, 3), (2.0, 0.3, 1.7, 4.0, 2.0))
SOME = {"bert": "query", "roberta": "query", "distilbert": "q_lin"}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_plain_peft_loads_what_we_save_with_our_logits(
    zoo: Any, tmp_path: Path, name: str, head: bool
) -> None:
    base = zoo.base(name)
    adapter = zoo.adapter(base, *MIXED, head=head)
    save_adapter(adapter, base, tmp_path)
    model = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path))
    got, want, rows = zoo.theirs(base, model), zoo.ours(base, adapter), zoo.batch(base)
    assert zoo.same(base, want, got, rows)
    with torch.no_grad():
        assert not zoo.same(base, base.logits(rows), want, rows, 0.01)
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
    files = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in tmp_path.iterdir()} == {*files, "base"}
    assert {file.name for file in (tmp_path / "base").iterdir()} == {"config.json"}
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


@pytest.mark.parametrize("name", EVERY)
def test_a_merged_model_gives_the_adapter_s_logits(zoo: Any, tmp_path: Path, name: str) -> None:
    base = zoo.base(name)
    adapter = zoo.adapter(base, *MIXED)
    want, rows = zoo.ours(base, adapter), zoo.batch(base)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    merge(base, adapter)
    with torch.no_grad():
        assert zoo.same(base, want, base.logits(rows), rows)
    touched = {n for n, p in base.model.named_parameters() if not torch.equal(p, before[n])}
    assert touched == {f"{n}.weight" for n in adapter.pairs} | set(adapter.extra)
    base.model.save_pretrained(str(tmp_path))
    plain = type(base.model).from_pretrained(str(tmp_path))
    assert zoo.same(base, want, zoo.theirs(base, plain), rows)


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
    adapter = fresh_adapter(base, shapes, LoRA().peer(0, 4, shapes), base.heads)
    save_adapter(adapter, base, tmp_path)
    model = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path))
    rows = zoo.batch(base)
    with torch.no_grad():
        assert zoo.same(base, base.logits(rows), zoo.theirs(base, model), rows)
