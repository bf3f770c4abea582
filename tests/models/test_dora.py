"""DoRA: m ⊙ V / ‖V‖ for K clients at once, and as PEFT loads, saves and trains it."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import State, Task
from fedlora.models import (
    MultiAdapterModel,
    load_adapter,
    merge,
    parametrized,
    save_adapter,
    take_out_of_base,
    targets,
)
from fedlora.models.lora import layer_weight
from fedlora.models.parametrizations import DoRA, Sparse, composed
from fedlora.models.parametrizations.sparse import places
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit

MAGNITUDE = ".magnitude"
pytestmark = [
    pytest.mark.slow,  # whole runs or every architecture
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EVERY = ("bert", "bert-mlm", "roberta", "distilbert", "llama", "llama-cls", "gpt2", "gpt2-cls")


def dora(base: Any, adapter: Adapter, base_delta: Any = None) -> Adapter:
    """The adapter with magnitudes, those with which nothing changes."""
    return parametrized(base, adapter, DoRA(), base_delta)


def stretched(adapter: Adapter, base: Any, seed: int = 0) -> Adapter:
    """Magnitudes moved off their start, each by up to a third."""
    rng, new = np.random.default_rng([seed, 8]), dora(base, adapter)
    moved = {
        name: value * torch.from_numpy(rng.uniform(0.7, 1.3, value.shape)).to(value)
        for name, value in new.extra.items()
        if name.endswith(MAGNITUDE)
    }
    return new.with_tensors(moved)


def random(zoo: Any, base: Any, rank: Any = (3, 1, 5), scale: Any = (2.0, 0.3), seed: int = 0) -> Adapter:
    return stretched(zoo.adapter(base, rank, scale, seed), base, seed)


def logits(zoo: Any, base: Any, task: Task) -> torch.Tensor:
    with torch.no_grad(), MultiAdapterModel(base, [task]):
        return base.logits(zoo.batch(base))


@pytest.mark.parametrize("name", EVERY)
def test_new_magnitudes_change_nothing(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    adapter = zoo.adapter(base, 2)
    got = logits(zoo, base, Task(dora(base, adapter)))
    assert zoo.same(base, zoo.ours(base, adapter), got, zoo.batch(base), 1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_layer_does_what_the_paper_says(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    adapter = random(zoo, base)
    m = sorted(adapter.pairs)[1]
    pair, module = adapter.pairs[m], base.model.get_submodule(m)
    V = layer_weight(module, m).numpy() + pair.scale * pair.B.numpy() @ pair.A.numpy()
    W = adapter.extra[m + MAGNITUDE].numpy()[:, None] * V / np.linalg.norm(V, axis=1)[:, None]
    x = torch.randn(2, 5, pair.shape[1], dtype=torch.float64)
    with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]):
        got = module(x)
    np.testing.assert_allclose(got, x.numpy() @ W.T + module.bias.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_plain_peft_loads_what_we_save_with_our_logits(
    zoo: Any, tmp_path: Path, name: str, head: bool
) -> None:
    base = zoo.base(name)
    adapter = stretched(zoo.adapter(base, (3, 1, 5), (2.0, 0.3, 1.7), head=head), base)
    save_adapter(adapter, base, tmp_path)
    model = PeftModel.from_pretrained(zoo.plain(base), str(tmp_path))
    got, rows = logits(zoo, base, Task(adapter)), zoo.batch(base)
    assert zoo.same(base, zoo.theirs(base, model), got, rows, 2e-5)
    assert not zoo.same(base, zoo.ours(base, Adapter(adapter.pairs)), got, rows, 0.01)
    back = load_adapter(tmp_path, base)
    assert back.parametrization == DoRA()
    for name, own in adapter.own_factors().items():
        assert torch.equal(back.extra[name + MAGNITUDE], own["magnitude"])
    assert zoo.same(base, logits(zoo, base, Task(back)), got, rows, 1e-6)


def their_model(zoo: Any, base: Any, m: str) -> Any:
    """PEFT's own DoRA of one kind of module, with B and the magnitudes moved."""
    config = LoraConfig(
        r=3,
        lora_alpha=5.0,
        target_modules=[m],
        use_dora=True,
        fan_in_fan_out=m == "c_fc",
        task_type=TaskType[base.task.peft_type],
    )
    model = get_peft_model(zoo.plain(base), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.2 * torch.randn_like(p)
            if "magnitude" in name:
                p *= 1 + 0.3 * torch.rand_like(p)
    return model


@pytest.mark.parametrize(("name", "m"), [("bert", "query"), ("llama", "q_proj"), ("gpt2", "c_fc")])
def test_loss_and_gradients_are_peft_s(zoo: Any, tmp_path: Path, name: str, m: str) -> None:
    base = zoo.base(name)
    model = their_model(zoo, base, m)
    model.save_pretrained(str(tmp_path))
    ours = load_adapter(tmp_path, base)
    rows = zoo.batch(base)
    base.scores(model.eval()(**rows.inputs).logits, rows)[0].sum().backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".lora_" in n}
    with MultiAdapterModel(base, [Task(ours)], train=True) as bank:
        base.losses(rows)[0].sum().backward()
        groups = bank.factors(0)
    named = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude"}
    assert named.keys() <= groups.keys()
    for group, theirs in named.items():
        want = [grad for n, grad in sorted(wanted.items()) if theirs in n]
        assert len(want) == len(groups[group]) > 0
        for p, grad in zip(groups[group], want, strict=True):
            torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_k_at_once_equals_one_by_one_in_float64(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    work = []
    for k, (rank, scale) in enumerate(((1, 2.0), (5, 0.5), (20, 1.3))):
        rows = zoo.rows(base, 7, seed=k)
        base_delta = {m: Pair(0.1 * p.A, p.B) for m, p in zoo.adapter(base, 2, seed=9).pairs.items()}
        task = Task(random(zoo, base, rank, scale, seed=k), base_delta=base_delta if k else {})
        work.append(FitJob(task, [rows[:3], rows[3:5], rows[5:]][: 3 - (k == 1)]))

    def make(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": found} for found in groups.values()], lr=0.1)

    together = fit(base, work, make, clip=0.5, tokens=30)
    for job, found in zip(work, together, strict=True):
        alone = fit(base, [job], make, clip=0.5, tokens=30)[0]
        assert zoo.gap(alone.adapter, found.adapter) < 1e-9
        start = dict(job.task.adapter.tensors())
        assert all(not torch.equal(t, start[n]) for n, t in found.adapter.tensors() if MAGNITUDE in n)
    assert zoo.clean(base)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2-cls"])
def test_a_merged_model_gives_the_adapter_s_logits(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    adapter, rows = random(zoo, base), zoo.batch(base)
    want = logits(zoo, base, Task(adapter))
    merge(base, adapter)
    with torch.no_grad():
        assert zoo.same(base, want, base.logits(rows), rows, 2e-5)


def test_a_base_delta_counts_to_the_direction_and_is_exported_with_it(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    fresh = zoo.adapter(base, 3)
    adapter, base_delta = take_out_of_base(base, fresh, "pissa")
    plain = logits(zoo, base, Task(Adapter({}, fresh.extra)))
    neutral = dora(base, adapter, base_delta)
    assert zoo.same(
        base, plain, logits(zoo, base, Task(neutral, base_delta=base_delta)), zoo.batch(base), 1e-5
    )
    for m in adapter.pairs:
        W = layer_weight(base.model.get_submodule(m), m)
        torch.testing.assert_close(neutral.extra[m + MAGNITUDE], W.norm(dim=1), atol=1e-5, rtol=1e-5)
    moved = {m: Pair(p.A * 1.2, p.B + 0.05, p.scale) for m, p in adapter.pairs.items()}
    state = State(stretched(Adapter(moved, fresh.extra), base), base_delta=base_delta)
    got = logits(zoo, base, Task(state.adapter, base_delta=base_delta))
    save_adapter(state.whole(), base, tmp_path)
    theirs = zoo.theirs(base, PeftModel.from_pretrained(zoo.plain(base), str(tmp_path)))
    assert zoo.same(base, theirs, got, zoo.batch(base), 2e-5)


def test_sparse_values_count_to_the_direction_too(zoo: Any) -> None:
    base = zoo.base("gpt2", double=True)
    m, (d_out, d_in) = next(iter(targets(base, "c_fc").items()))
    values = torch.randn(40, dtype=torch.float64)
    magnitudes = 1 + torch.rand(d_out, dtype=torch.float64)
    module, x = base.model.get_submodule(m), torch.randn(2, 5, d_in, dtype=torch.float64)
    V = layer_weight(module, m).numpy().copy()
    V.reshape(-1)[places(3, m, (d_out, d_in), 40).numpy()] += values.numpy()
    W = magnitudes.numpy()[:, None] * V / np.linalg.norm(V, axis=1)[:, None]
    extra = {f"{m}.sparse": values, m + MAGNITUDE: magnitudes}
    adapter = Adapter({}, extra, composed(Sparse(3), DoRA()))
    with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]):
        got = module(x)
    np.testing.assert_allclose(got, x.numpy() @ W.T + module.bias.detach().numpy(), atol=1e-12)


def test_a_module_without_magnitudes_is_plain_lora_also_for_peft(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("bert")
    full = random(zoo, base)
    gone = sorted(full.pairs)[0] + MAGNITUDE
    adapter = Adapter(full.pairs, {n: t for n, t in full.extra.items() if n != gone}, DoRA())
    save_adapter(adapter, base, tmp_path)
    theirs = zoo.theirs(base, PeftModel.from_pretrained(zoo.plain(base), str(tmp_path)))
    assert zoo.same(base, theirs, logits(zoo, base, Task(adapter)), zoo.batch(base), 2e-5)


def test_a_bfloat16_base_works_in_the_precision_of_the_adapter(zoo: Any) -> None:
    whole, half = zoo.base("bert"), zoo.base("bert", dtype="bfloat16")
    adapter = random(zoo, whole)
    with torch.no_grad(), MultiAdapterModel(half, [Task(adapter)]):
        got = half.logits(zoo.batch(half))
    assert got.dtype == torch.float32
    assert zoo.same(whole, logits(zoo, whole, Task(adapter)), got, zoo.batch(whole), 0.05)
    assert dora(half, zoo.adapter(whole, 2)).extra.popitem()[1].dtype == torch.float32


def test_a_row_of_zeros_stays_one(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = zoo.adapter(base, 2)
    m = sorted(adapter.pairs)[0]
    base.model.get_submodule(m).weight.data[1] = 0
    adapter.pairs[m].B[1] = 0
    got = logits(zoo, base, Task(dora(base, adapter)))
    assert zoo.same(base, zoo.ours(base, adapter), got, zoo.batch(base), 1e-5)


def test_magnitudes_are_an_optimizer_group_of_their_own(zoo: Any) -> None:
    base = zoo.base("bert")
    with MultiAdapterModel(base, [Task(random(zoo, base), frozenset("B"))], train=True) as bank:
        assert list(bank.factors(0)) == ["B", "magnitude", "head"]
    make = partial(torch.optim.SGD, lr=0.1)
    rows = zoo.rows(base, 4, 1)
    job = FitJob(Task(random(zoo, base)), [rows])
    found = fit(base, [job], lambda groups: make(groups["magnitude"]))[0].adapter
    moved = {n for n, t in found.tensors() if not torch.equal(t, dict(job.task.adapter.tensors())[n])}
    assert moved == {m + MAGNITUDE for m in found.pairs}
