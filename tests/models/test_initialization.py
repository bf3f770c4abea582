"""Adapters taken out of the base: what PEFT makes of PiSSA and OLoRA, without a change of the base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import State, Task
from fedlora.errors import ConfigError, ModelError
from fedlora.models import LoRA, MultiAdapterModel, fresh_adapter, save_adapter, take_out_of_base, targets
from fedlora.models.lora import layer_weight
from fedlora.strategies import FeDeRA

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERY = ("bert", "roberta", "distilbert", "llama", "llama-cls", "gpt2", "gpt2-cls")
STARTS = ("pissa", "olora")


def start(base: Any, init: str, rank: int = 3, alpha: float = 5.0, head: bool = True) -> Any:
    shapes = targets(base, "all-linear")
    fresh = fresh_adapter(base, shapes, LoRA(alpha=alpha).peer(0, rank, shapes), base.heads if head else ())
    return take_out_of_base(base, fresh, init)


def dense(pair: Pair) -> np.ndarray:
    return pair.scale * (pair.B.double().numpy() @ pair.A.double().numpy())


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("name", EVERY)
def test_the_model_starts_as_the_plain_base(zoo: Any, name: str, init: str) -> None:
    base = zoo.base(name)
    adapter, base_delta = start(base, init)
    rows = zoo.batch(base)
    with torch.no_grad():
        plain = base.logits(rows)
        with MultiAdapterModel(base, [Task(adapter, base_delta=base_delta)]):
            got = base.logits(rows)
        with MultiAdapterModel(base, [Task(adapter)]):  # the part that was taken out counts
            doubled = base.logits(rows)
    assert zoo.same(base, plain, got, rows, 1e-5)
    assert not zoo.same(base, plain, doubled, rows, 1e-2)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_products_and_residual_weights_are_peft_s(zoo: Any, name: str, init: str) -> None:
    if (name, init) == ("gpt2", "olora"):
        pytest.skip("PEFT takes the QR of a Conv1D's weight as it lies, transposed")
    base = zoo.base(name)
    adapter, base_delta = start(base, init)
    config = LoraConfig(
        r=3,
        lora_alpha=5.0,
        target_modules=list(adapter.pairs),
        init_lora_weights=init,
        fan_in_fan_out=name == "gpt2",
        task_type=TaskType[base.task.peft_type],
    )
    theirs = get_peft_model(zoo.plain(base), config).base_model.model
    for m, pair in adapter.pairs.items():
        layer = theirs.get_submodule(m)
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        want = layer.scaling["default"] * (B @ A).detach().double().numpy()
        np.testing.assert_allclose(dense(pair), want, atol=2e-5)  # PEFT works in float32
        # The factors too, up to the sign of each direction.
        np.testing.assert_allclose(pair.A.abs(), A.detach().abs(), atol=2e-4)
        np.testing.assert_allclose(pair.B.abs(), B.detach().abs(), atol=2e-4)
        left = layer_weight(layer.base_layer, m).double().numpy()
        ours = layer_weight(base.model.get_submodule(m), m).double().numpy() + dense(base_delta[m])
        np.testing.assert_allclose(ours, left, atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_pissa_is_the_principal_part_split_evenly(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    adapter, base_delta = start(base, "pissa")
    for m, pair in adapter.pairs.items():
        module = base.model.get_submodule(m)
        W = module.weight.detach().numpy()
        W = W.T if type(module).__name__ == "Conv1D" else W
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        np.testing.assert_allclose(dense(pair), (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5)
        even = np.sqrt(S[:3] / pair.scale)
        np.testing.assert_allclose(pair.A.norm(dim=1), even, rtol=1e-5)
        np.testing.assert_allclose(pair.B.norm(dim=0), even, rtol=1e-5)
        np.testing.assert_allclose(dense(base_delta[m]), -dense(pair), atol=1e-6)
        assert base_delta[m].scale == 1
        assert pair.scale == 5 / 3


def test_olora_is_the_first_part_of_a_qr(zoo: Any) -> None:
    base = zoo.base("gpt2", double=True)
    adapter, _ = start(base, "olora")
    for m, pair in adapter.pairs.items():
        W = layer_weight(base.model.get_submodule(m), m).numpy()
        Q, R = np.linalg.qr(W)
        np.testing.assert_allclose(pair.B.abs(), abs(Q[:, :3]), atol=1e-6)
        np.testing.assert_allclose(dense(pair), 5 / 3 * Q[:, :3] @ R[:3], atol=1e-5)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("rank", [16, 30])
def test_a_rank_beyond_the_layer_takes_all_of_it_and_keeps_its_rank(zoo: Any, init: str, rank: int) -> None:
    base = zoo.base("bert")
    adapter, base_delta = start(base, init, rank)
    for m, pair in adapter.pairs.items():
        W = layer_weight(base.model.get_submodule(m), m).double().numpy()
        assert pair.rank == rank
        left = W + dense(base_delta[m])
        if init == "pissa" or pair.scale == 1:
            np.testing.assert_allclose(left, 0, atol=1e-5)
        np.testing.assert_allclose(left + dense(pair), W, atol=1e-5)
        assert (pair.A.norm(dim=1) + pair.B.norm(dim=0) > 0).all()


@pytest.mark.parametrize("init", STARTS)
def test_what_is_trained_from_it_is_a_delta_of_twice_the_rank_for_plain_peft(
    zoo: Any, tmp_path: Path, init: str
) -> None:
    base = zoo.base("bert")
    adapter, base_delta = start(base, init)
    moved = {m: Pair(p.A + 0.1 * torch.randn_like(p.A), p.B * 1.1, p.scale) for m, p in adapter.pairs.items()}
    state = State(Adapter(moved, adapter.extra), base_delta=base_delta)
    whole = state.whole()
    assert {pair.rank for pair in whole.pairs.values()} == {6}
    save_adapter(whole, base, tmp_path)
    theirs = zoo.theirs(base, PeftModel.from_pretrained(zoo.plain(base), str(tmp_path)))
    rows = zoo.batch(base)
    with torch.no_grad(), MultiAdapterModel(base, [Task(state.adapter, base_delta=base_delta)]):
        ours = base.logits(rows)
    assert zoo.same(base, theirs, ours, rows, 1e-5)
    for pair in whole.pairs.values():
        sigma = np.linalg.svd(dense(pair), compute_uv=False)
        assert (sigma[6:] < 1e-5 * sigma[0]).all()


def test_a_bfloat16_base_is_taken_apart_in_higher_precision(zoo: Any) -> None:
    base = zoo.base("bert", dtype="bfloat16")
    adapter, base_delta = start(base, "pissa")
    for m, pair in adapter.pairs.items():
        W = base.model.get_submodule(m).weight.detach().double().numpy()
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        np.testing.assert_allclose(dense(pair), (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-5)
        assert pair.A.dtype == base_delta[m].B.dtype == torch.float32
    rows = zoo.batch(base)
    with torch.no_grad():
        plain = base.logits(rows)
        with MultiAdapterModel(base, [Task(adapter, base_delta=base_delta)]):
            assert zoo.same(base, plain, base.logits(rows), rows, 0.05)


def test_the_head_is_kept_and_nothing_is_changed(zoo: Any) -> None:
    base = zoo.base("bert")
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    adapter, base_delta = start(base, "pissa")
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
    assert adapter.extra.keys() == base.head_state().keys()
    assert base_delta.keys() == adapter.pairs.keys()
    again, _ = start(base, "pissa")
    assert again.digest() == adapter.digest()
    fresh, nothing = start(base, "lora")
    assert nothing == {}
    assert not any(pair.B.any() for pair in fresh.pairs.values())


class Quantised(torch.nn.Linear):
    """A layer whose weight is kept in bytes and widened for each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_no_such_start_and_a_quantised_weight_are_refused(zoo: Any) -> None:
    base = zoo.base("bert")
    with pytest.raises(ConfigError, match=r"lora\.init: expected lora, pissa or olora, got 'eva'"):
        start(base, "eva")
    name = next(iter(targets(base, "all-linear")))
    layer = base.model.get_submodule(name)
    layer.__class__ = Quantised
    layer.weight = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised weight.*model\.quantize=null"):
        start(base, "pissa")


def test_federa_goes_on_from_it_as_the_plain_base(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter, base_delta = start(base, FeDeRA.start)
    state = FeDeRA().init(adapter, base_delta, 3)
    assert state.seed == 3
    for m in adapter.pairs:
        assert state.delta(m).abs().max() < 1e-6
