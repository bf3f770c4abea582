"""Experts that are kept in one parameter are adapted one by one, as PEFT's `target_parameters` does it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.errors import ModelError
from fedlora.models import (
    Base,
    LoRA,
    MultiAdapterModel,
    expert_targets,
    load_adapter,
    merge,
    save_adapter,
)
from fedlora.models.experts import Joined, join, part

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),  # PEFT follows them
]

MODELS = ("mixtral", "olmoe", "qwen3-moe", "gpt-oss")
BOTH = ["mlp.experts.gate_up_proj", "experts.down_proj"]


def adapter(zoo: Any, base: Base, rank: Any = 3, scale: Any = 1.7, seed: int = 0) -> Adapter:
    """Random factors of all experts and of one kind of linear layer."""
    made: Adapter = zoo.adapter(base, rank, scale, seed, "q_proj", False, BOTH)
    return made


def made_by_peft(zoo: Any, base: Base, folder: Path, **more: Any) -> Any:
    torch.manual_seed(11)
    config = LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=BOTH, **more
    )
    model = get_peft_model(zoo.plain(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_plain_peft_and_fedlora_load_one_another_s_experts(zoo: Any, tmp_path: Path, name: str) -> None:
    base = zoo.base(name)
    ours, rows = adapter(zoo, base, (3, 1, 4), (2.0, 0.3)), zoo.batch(base)
    want = zoo.ours(base, ours)
    save_adapter(ours, base, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path / "ours"))
    assert zoo.same(base, want, zoo.theirs(base, theirs), rows)
    with torch.no_grad():
        assert not zoo.same(base, base.logits(rows), want, rows, 0.01)
    assert zoo.same(base, want, zoo.ours(base, load_adapter(tmp_path / "ours", base)), rows)
    model = made_by_peft(zoo, base, tmp_path / "theirs", rank_pattern={"down_proj": 5}, use_rslora=True)
    back = load_adapter(tmp_path / "theirs", base)
    assert {pair.rank for pair in back.pairs.values()} == {3, 5}
    assert zoo.same(base, zoo.theirs(base, model), zoo.ours(base, back), rows)
    merge(base, ours)
    with torch.no_grad():
        assert zoo.same(base, want, base.logits(rows), rows)
    assert zoo.clean(base)


@pytest.mark.parametrize("own", [["gate_up_proj"], ["down_proj"], BOTH])
def test_one_parameter_or_both_come_back_with_the_same_digest(
    zoo: Any, tmp_path: Path, own: list[str]
) -> None:
    base = zoo.base("mixtral")
    whole = adapter(zoo, base)
    some = Adapter({name: whole.pairs[name] for name in expert_targets(base, own)})
    save_adapter(some, base, tmp_path)
    assert load_adapter(tmp_path, base).digest() == some.digest()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_joined_factors_are_what_peft_multiplies(E: int, rank: int, d_out: int, d_in: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    pairs = {
        f"experts.W[{e}]": Pair(
            torch.randn(rank, d_in, generator=rng), torch.randn(d_out, rank, generator=rng), 0.5
        )
        for e in range(E)
    }
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].W = nn.Parameter(torch.zeros(E, d_out, d_in))
    joined = join(pairs, model)["experts.W"]
    A, B = joined.A.reshape(E, rank, d_in), joined.B.reshape(d_out, rank, E)  # ParamWrapper.get_delta_weight
    delta = torch.einsum("o r e, e r i -> e o i", B, A) * joined.scale
    for e in range(E):
        pair = pairs[f"experts.W[{e}]"]
        torch.testing.assert_close(delta[e], pair.scale * pair.B @ pair.A)
    assert Adapter(part(joined, "experts.W")).digest() == Adapter(pairs).digest()


def test_an_expert_without_a_pair_and_smaller_ranks_are_filled_with_zeros() -> None:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].W = nn.Parameter(torch.zeros(3, 4, 2))
    pairs = {
        "experts.W[2]": Pair(torch.ones(1, 2), torch.ones(4, 1), 2.0),
        "experts.W[0]": Pair(torch.ones(2, 2), torch.ones(4, 2), 1.0),
    }
    joined = join(pairs, model)["experts.W"]
    assert isinstance(joined, Joined)
    changes = [pair.scale * pair.B @ pair.A for pair in part(joined, "experts.W").values()]
    assert [float(change.mean()) for change in changes] == [2.0, 0.0, 2.0]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_gradients_are_peft_s(zoo: Any, tmp_path: Path, name: str) -> None:
    base = zoo.base(name, double=True)
    plain = zoo.plain(base).double()
    plain.set_experts_implementation("eager")
    mine = adapter(zoo, base)
    save_adapter(mine, base, tmp_path)
    model = PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True, autocast_adapter_dtype=False)
    batch = zoo.batch(base)
    base.task.scores(model(**batch.inputs).logits, batch.target)[0].sum().backward()
    theirs = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    with MultiAdapterModel(base, [Task(mine)], train=True) as bank:
        grads = dict(bank.gradients(base.losses(batch)[0].sum(), [0]))
        found = {n: grads[p] for n, p in bank.parameters(0).items()}
    for parameter, depth in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        path = "model.layers.1.mlp.experts"
        pairs = {
            f"{path}.{parameter}[{e}]": Pair(*(found[f"{path}.{parameter}[{e}].{f}"] for f in "AB"))
            for e in range(4)
        }
        whole = join(pairs, base.model)[f"{path}.{parameter}"]
        for factor, tensor in (("A", whole.A), ("B", whole.B)):
            want = theirs[f"base_model.model.{path}.{depth}lora_{factor}.weight"]
            torch.testing.assert_close(tensor, want, rtol=1e-8, atol=1e-10)


def test_patterns_name_the_parameter_of_all_its_experts(zoo: Any) -> None:
    shapes = expert_targets(zoo.base("mixtral"), BOTH)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj[3]"] == (48, 16)
    assert shapes["model.layers.1.mlp.experts.down_proj[0]"] == (16, 24)
    assert len(shapes) == 16
    assert expert_targets(zoo.base("mixtral"), "layers.1.*down_proj").keys() == {
        f"model.layers.1.mlp.experts.down_proj[{e}]" for e in range(4)
    }
    peer = LoRA(rank_pattern={"down_proj": 2}).peer(0, 8, shapes)
    assert set(peer.ranks.values()) == {2}
    assert {name.rpartition(".")[2][:9] for name in peer.ranks} == {"down_proj"}


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        (
            "mixtral",
            "down",
            "'down' fits no parameter of .*; those that hold experts end in mlp.exp",
        ),
        ("llama", "down_proj", "fits no parameter of .*; it has none that holds experts"),
        ("mixtral", "q_proj.weight", r"the linear layer 'model\S+q_proj'; name it in lora.targets"),
        ("mixtral", "mlp.gate.weight", r"three dimensions .* got 'mlp.gate.weight' for '\S+' \(4, 16\)"),
        ("gpt-oss", "down_proj_bias", r"three dimensions"),
    ],
)
def test_what_is_no_expert_is_refused(zoo: Any, name: str, wanted: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        expert_targets(zoo.base(name), wanted)
    assert "\n" not in str(caught.value)


def test_experts_that_are_quantised_or_computed_in_another_way_are_refused(
    zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo.base("mixtral")
    experts = base.model.model.layers[0].mlp.experts
    with monkeypatch.context() as patch:
        patch.setattr(experts, "_apply_gate", lambda y: y.chunk(2, dim=-1)[0])
        patch.setattr(base.model.config, "_experts_implementation", "eager")  # which has the gate inside
        with pytest.raises(ModelError, match=r"in another way than fedlora can \(their logits differ"):
            expert_targets(base, BOTH)
    del experts.has_gate
    with pytest.raises(ModelError, match=r"MixtralExperts\) computes its experts in a way of its own"):
        expert_targets(base, BOTH)
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"down_proj' is quantised \(float8_e4m3fn\)"):
        expert_targets(base, "layers.0.mlp.experts.down_proj")
