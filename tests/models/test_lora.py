import subprocess
import sys
from typing import Any

import pytest
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.algebra import truncate
from fedlora.errors import ConfigError, FedLoraError, ModelError
from fedlora.models import LoRA, fresh_adapter, targets
from fedlora.models.lora import by_pattern

MODULES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.11.output.dense"]


def test_names_fit_the_ends_of_paths_as_in_peft(zoo: Any) -> None:
    base = zoo.base("bert")
    layer = "bert.encoder.layer"
    assert targets(base, "query") == {f"{layer}.{i}.attention.self.query": (16, 16) for i in (0, 1)}
    assert targets(base, ["intermediate.dense"]) == {
        f"{layer}.{i}.intermediate.dense": (24, 16) for i in (0, 1)
    }
    assert targets(base, ["layer.0.*.query", "value"]).keys() == {
        f"{layer}.0.attention.self.query",
        f"{layer}.0.attention.self.value",
        f"{layer}.1.attention.self.value",
    }
    assert list(targets(base, ["value", "query"])) == sorted(targets(base, ["query", "value"]))
    assert targets(base, f"{layer}.1.attention.self.key") == {f"{layer}.1.attention.self.key": (16, 16)}


@pytest.mark.parametrize(
    ("name", "number", "out"),
    [
        ("bert", 2 * 6 + 1, ("classifier",)),  # 6 a layer, and the pooler that the checkpoint holds
        ("bert-mlm", 2 * 6, ("classifier", "pooler")),
        ("roberta", 2 * 6 + 0, ("classifier",)),
        ("distilbert", 2 * 6, ("classifier",)),
        ("llama", 2 * 7, ("lm_head", "embed")),
        ("llama-cls", 2 * 7, ("score",)),
        ("gpt2", 2 * 4, ("lm_head", "wte")),
        ("gpt2-cls", 2 * 4, ("score",)),
    ],
)
def test_all_linear_is_all_but_heads_and_output_layer(
    zoo: Any, name: str, number: int, out: tuple[str, ...]
) -> None:
    found = targets(zoo.base(name), "all-linear")
    assert len(found) == number
    assert not [n for n in found if any(part in n for part in out)]


def test_conv1d_counts_as_a_linear_layer_of_transposed_weight(zoo: Any) -> None:
    assert targets(zoo.base("gpt2"), ["c_attn", "mlp.c_proj"]) == {
        **{f"transformer.h.{i}.attn.c_attn": (48, 16) for i in (0, 1)},
        **{f"transformer.h.{i}.mlp.c_proj": (16, 64) for i in (0, 1)},
    }


@pytest.mark.parametrize(
    "wanted", ["querry", "uery", "classifier", "LayerNorm", ["query", "classifier.dense"]]
)
def test_a_name_that_fits_nothing_is_refused_with_those_that_do(zoo: Any, wanted: Any) -> None:
    with pytest.raises(ModelError, match="they end in dense, key, query, value; or use all-linear") as caught:
        targets(zoo.base("roberta"), wanted)
    assert "\n" not in str(caught.value)


def test_the_scale_is_constant_unless_alpha_is_given() -> None:
    assert [LoRA().peer(0, r, MODULES).scales[MODULES[0]] for r in (1, 8, 200)] == [2.0, 2.0, 2.0]
    assert LoRA(scale=0.7).peer(0, 3, MODULES).scales == dict.fromkeys(MODULES, 0.7)
    assert LoRA(alpha=16).peer(0, 8, MODULES).scales == dict.fromkeys(MODULES, 2.0)
    assert LoRA(alpha=16).peer(0, 3, MODULES).scales == dict.fromkeys(MODULES, 16 / 3)
    assert LoRA(alpha=16, use_rslora=True).peer(0, 4, MODULES).scales == dict.fromkeys(MODULES, 8.0)


def test_patterns_set_rank_and_alpha_of_single_modules() -> None:
    query, dense = MODULES
    first = "bert.encoder.layer.1.output.dense"
    lora = LoRA(alpha=16, rank_pattern={"query": 2, r"layer\.1\..*": 5}, alpha_pattern={"output.dense": 4})
    peer = lora.peer(3, 8, [*MODULES, first])
    assert (peer.id, peer.rank, peer.ranks) == (3, 8, {query: 2, first: 5})  # layer.1 is not layer.11
    assert peer.scales == {query: 8.0, dense: 0.5, first: 0.8}
    assert LoRA(rank_pattern={"query": 3, "self.query": 4}).peer(0, 8, MODULES).ranks == {query: 3}
    assert by_pattern({"uery": 3, "bert": 4}, query, 8) == 8
    assert LoRA(rank_pattern={"query": 8}).peer(0, 8, MODULES).ranks == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True}, "need lora.alpha"),
        ({"alpha_pattern": {"query": 2}}, "need lora.alpha"),
        ({"scale": 0}, r"lora\.scale: expected a number above 0, got 0"),
        ({"scale": float("nan")}, r"lora\.scale"),
        ({"alpha": -1}, r"lora\.alpha: expected a number above 0, got -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"query": 0}},
        {"rank_pattern": {"query": 2.5}},
        {"alpha": 1, "alpha_pattern": {"query": 0}},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"querry": 2}},
    ],
    ids=str,
)
def test_patterns_that_cannot_work_are_refused(zoo: Any, settings: dict[str, Any]) -> None:
    base = zoo.base("bert")
    shapes = targets(base, "query")
    with pytest.raises(FedLoraError):
        fresh_adapter(base, shapes, LoRA(**settings).peer(0, 4, shapes), ())


def fresh(base: Any, rank: int = 4, seed: int = 0, head: bool = True, **lora: Any) -> Adapter:
    shapes = targets(base, "all-linear")
    return fresh_adapter(base, shapes, LoRA(**lora).peer(0, rank, shapes), base.heads if head else (), seed)


def test_a_fresh_adapter_changes_nothing_and_fills_the_bounds_of_its_rows(zoo: Any) -> None:
    base = zoo.base("gpt2-cls")
    adapter = fresh(base, 6, scale=1.5)
    assert {n: p.shape for n, p in adapter.pairs.items()} == targets(base, "all-linear")
    for pair in adapter.pairs.values():
        bound = pair.shape[1] ** -0.5
        assert pair.rank == 6
        assert pair.scale == 1.5
        assert not pair.B.any()
        assert 0.8 * bound < pair.A.abs().max() <= bound * (1 + 1e-6)
        assert abs(pair.A.mean()) < 0.3 * bound
        assert pair.A.dtype == pair.B.dtype == torch.float32
    values = [pair.A.flatten()[0].item() for pair in adapter.pairs.values()]
    assert len(set(values)) == len(values)
    assert adapter.extra.keys() == base.head_state().keys()
    for name, value in base.head_state().items():
        assert torch.equal(adapter.extra[name], value)
    assert fresh(base, head=False).extra == {}


def test_a_fresh_adapter_takes_ranks_of_single_modules_and_follows_the_seed_alone(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = fresh(base, 4, rank_pattern={"query": 7}, alpha=7)
    assert {p.rank for n, p in adapter.pairs.items() if n.endswith("query")} == {7}
    assert {p.scale for n, p in adapter.pairs.items() if n.endswith("query")} == {1.0}
    assert {p.rank for n, p in adapter.pairs.items() if not n.endswith("query")} == {4}
    torch.manual_seed(123)
    assert fresh(base).digest() == fresh(zoo.base("bert")).digest()
    assert fresh(base).digest() != fresh(base, seed=1).digest()
    largest = fresh(base, 8)
    for pair in largest.pairs.values():  # a smaller client's start is cut from the largest one's
        assert torch.equal(truncate(pair, 3).A, pair.A[:3])


@pytest.mark.slow
def test_another_process_draws_the_same_head_and_adapter(zoo: Any) -> None:
    base = zoo.base("bert", seed=5)
    script = (
        "from fedlora.models import load, targets, fresh_adapter, LoRA\n"
        f"base = load({base.path!r}, 'classification', {zoo.labels!r}, seed=5)\n"
        "shapes = targets(base, 'all-linear')\n"
        "print(fresh_adapter(base, shapes, LoRA().peer(0, 4, shapes), base.heads, 0).digest())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fresh(base).digest()
