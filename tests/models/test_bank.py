import dataclasses
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, Pair
from fedlora.data import collate
from fedlora.errors import ModelError
from fedlora.models import Bank, Base, fresh_adapter, merge, targets
from fedlora.models.bank import _LowRank
from fedlora.models.lora import LoRA
from fedlora.protocol import BOTH
from fedlora.trainer import Job, fit

SEGMENTS = {"one": [(0, 5)], "three": [(0, 2), (2, 3), (3, 5)], "one empty": [(0, 2), (2, 2), (2, 5)]}
SHAPES = {"rows": (5, 4), "rows of tokens": (5, 3, 4)}
SCALES = [1.7, 0.3, -2.0]


def factors(segments: list[tuple[int, int]], grads: str = "AB") -> list[Tensor]:
    torch.manual_seed(3)
    found = []
    for k in range(len(segments)):
        found.append(torch.randn(k + 1, 4, dtype=torch.float64).requires_grad_("A" in grads))
        found.append(torch.randn(6, k + 1, dtype=torch.float64).requires_grad_("B" in grads))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("grads", ["AB", "A", "B", ""])
@pytest.mark.parametrize("of_input", [True, False])
def test_gradients_are_those_of_finite_differences(
    shape: str, segments: str, grads: str, of_input: bool
) -> None:
    if not grads and not of_input:
        return
    parts = SEGMENTS[segments]
    own = factors(parts, grads)
    x = torch.randn(SHAPES[shape], dtype=torch.float64).requires_grad_(of_input)
    y = torch.randn((*x.shape[:-1], 6), dtype=torch.float64).requires_grad_(of_input)

    def add(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        return _LowRank.apply(y.clone(), x, parts, SCALES, *factors)  # in place, and so on a copy

    assert torch.autograd.gradcheck(add, (y, x, *own))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_each_segment_is_scale_times_its_own_product(shape: str, segments: str) -> None:
    parts = SEGMENTS[segments]
    own, x = factors(parts), torch.randn(SHAPES[shape], dtype=torch.float64)
    before = torch.randn((*x.shape[:-1], 6), dtype=torch.float64)
    y = _LowRank.apply(before.clone(), x, parts, SCALES, *own)
    for k, (start, stop) in enumerate(parts):
        dense = SCALES[k] * own[2 * k + 1] @ own[2 * k]
        torch.testing.assert_close(
            y[start:stop], before[start:stop] + x[start:stop] @ dense.T, rtol=1e-12, atol=1e-12
        )


def test_a_bfloat16_input_meets_float32_factors_in_float32() -> None:
    parts = SEGMENTS["three"]
    own = [f.detach().float().requires_grad_() for f in factors(parts)]
    x = torch.randn(5, 3, 4).bfloat16().requires_grad_()
    zero = torch.zeros(5, 3, 6)
    y = _LowRank.apply(zero.bfloat16(), x, parts, SCALES, *own)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert own[0].grad.dtype == torch.float32
    exact = _LowRank.apply(zero, x.detach().float(), parts, SCALES, *own)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_bfloat16_base_trains_float32_adapters(zoo: Any, name: str) -> None:
    base = zoo.base(name, dtype="bfloat16")
    shapes = targets(base, "all-linear")
    start = fresh_adapter(base, shapes, LoRA().peer(0, 3, shapes), True)
    jobs = [Job(start, [zoo.rows(base, 4, seed)]) for seed in range(2)]
    for one in fit(
        base, jobs, lambda groups: torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)
    ):
        assert {tensor.dtype for _, tensor in one.adapter.tensors()} == {torch.float32}
        assert all(torch.isfinite(tensor).all() for _, tensor in one.adapter.tensors())
        assert one.adapter.digest() != start.digest()


def seal(base: Base) -> str:
    digest = hashlib.sha256()
    for name, tensor in base.model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logits(base: Base, adapter: Adapter, rows: Any) -> Tensor:
    with torch.no_grad(), Bank(base, [adapter]):
        return base.logits(collate(rows, base.tokenizer.pad_token_id))


def clean(base: Base) -> bool:
    return not any(m._forward_hooks or "forward" in vars(m) for m in base.model.modules())


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_the_base_is_bit_identical_before_during_and_after(zoo: Any, name: str) -> None:
    base = zoo.base(name)
    rows = zoo.rows(base, 8, 1)
    before, batch = seal(base), collate(rows, base.tokenizer.pad_token_id)
    plain = base.logits(batch)
    adapters = [zoo.adapter(base, 2, seed=1), zoo.adapter(base, 3, seed=2)]
    seen = []

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.AdamW([p for found in groups.values() for p in found], lr=0.1)
        made.register_step_post_hook(lambda *_: seen.append(seal(base)))
        return made

    fit(base, [Job(adapter, [rows[:4], rows[4:]]) for adapter in adapters], optimizer)
    assert set(seen) == {before}
    assert seal(base) == before
    assert clean(base)
    assert torch.equal(base.logits(batch), plain)
    assert all(p.grad is None for p in base.model.parameters())


def test_an_error_inside_leaves_the_base_as_it_was(zoo: Any) -> None:
    base = zoo.base("bert")
    before = seal(base)
    with pytest.raises(ZeroDivisionError), Bank(base, [zoo.adapter(base, 2)]):
        1 / (0 if not clean(base) else 1)
    assert clean(base)
    with pytest.raises(RuntimeError, match="stop"):
        fit(base, [Job(zoo.adapter(base, 2), [zoo.rows(base, 2, 0)])], failing)
    assert clean(base)
    assert seal(base) == before


def failing(groups: Any) -> torch.optim.Optimizer:
    raise RuntimeError("stop")


def test_the_bank_never_writes_to_the_adapters_it_was_given(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = zoo.adapter(base, 2)
    before = adapter.digest()
    [one] = fit(
        base,
        [Job(adapter, [zoo.rows(base, 4, 0)])],
        lambda g: torch.optim.SGD([p for found in g.values() for p in found], lr=1.0),
    )
    assert adapter.digest() == before
    with Bank(base, [adapter], [BOTH]) as bank:
        copy = bank.adapter(0)
        assert copy.digest() == before
        bank.factors(0)["A"][0].data.zero_()
        assert copy.digest() == adapter.digest() == before
    assert one.adapter.digest() != before


def test_the_groups_of_parameters_are_those_that_are_trained(zoo: Any) -> None:
    base = zoo.base("bert")
    adapter = zoo.adapter(base, 2)
    for train, expected in (
        ("AB", {"A", "B", "head"}),
        ("A", {"A", "head"}),
        ("B", {"B", "head"}),
        ("", {"head"}),
    ):
        with Bank(base, [adapter, adapter], [frozenset(train)] * 2) as bank:
            assert set(bank.factors(1)) == expected
            assert not {p for g in bank.factors(0).values() for p in g} & {
                p for g in bank.factors(1).values() for p in g
            }
    with Bank(base, [zoo.adapter(base, 2, head=False)], [BOTH]) as bank:
        assert set(bank.factors(0)) == {"A", "B"}
    with Bank(base, [adapter]) as bank:
        assert bank.factors(0) == {}


def test_an_adapter_of_another_model_is_refused(zoo: Any) -> None:
    base = zoo.base("bert")
    good = zoo.adapter(base, 2)
    name, pair = next(iter(good.pairs.items()))
    unknown = Adapter({"bert.nowhere": pair})
    with (
        pytest.raises(ModelError, match=r"'bert\.nowhere', a module that the model lacks"),
        Bank(base, [unknown]),
    ):
        pass
    wrong = Adapter({**good.pairs, name: Pair(torch.zeros(2, 7), torch.zeros(9, 2))})
    with pytest.raises(ModelError, match=rf"{name}' is \(9, 7\), the layer"), Bank(base, [wrong]):
        pass
    norm = Adapter({"bert.embeddings.LayerNorm": pair})
    with pytest.raises(ModelError, match="needs a linear layer"), Bank(base, [norm]):
        pass
    short = Adapter(good.pairs, {"classifier.weight": good.extra["classifier.weight"]})
    with pytest.raises(ModelError, match=r"classifier\.bias' is None"):
        Bank(base, [short])
    more = Adapter(good.pairs, {**good.extra, "scorer.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"no head of the model owns: \['scorer\.weight'\]"):
        Bank(base, [more])
    assert clean(base)


def test_the_second_adapter_is_checked_like_the_first(zoo: Any) -> None:
    base = zoo.base("bert")
    good = zoo.adapter(base, 2)
    name = next(iter(good.pairs))
    fewer = Adapter({n: p for n, p in good.pairs.items() if n != name}, good.extra)
    wrong = Adapter({**good.pairs, name: Pair(torch.zeros(2, 7), torch.zeros(9, 2))}, good.extra)
    headless = Adapter(good.pairs)
    for other in (fewer, wrong, headless):
        with pytest.raises(ModelError), Bank(base, [good, other]):
            pass
    with pytest.raises(ModelError), Bank(base, [headless, good]):  # else the second's head is left out
        pass


def test_slots_of_one_batch_each_see_their_own_adapter_and_head(zoo: Any) -> None:
    for name in ("bert", "roberta", "gpt2-cls", "llama"):
        base = zoo.base(name, double=True)
        adapters = [zoo.adapter(base, r, s, seed=r) for r, s in ((1, 2.0), (4, 0.7), (2, 1.0))]
        rows = [zoo.rows(base, 2, 1, 5)[:1] * 3, [], zoo.rows(base, 2, 1, 5)[:1] * 2]
        batch = collate([row for own in rows for row in own], base.tokenizer.pad_token_id)
        with torch.no_grad(), Bank(base, adapters) as bank:
            bank.route([3, 0, 2])
            got = base.logits(batch)
        torch.testing.assert_close(got[:3], logits(base, adapters[0], rows[0]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got[3:], logits(base, adapters[2], rows[2]), rtol=1e-10, atol=1e-10)
        assert (got[0] - got[3]).abs().max() > 1e-3


class Crossed(nn.Module):
    """Feeds a layer an input that is not contiguous, over tokens and over features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(pad_token_id=0)
        self.embed, self.query = nn.Embedding(60, 8), nn.Linear(8, 8)
        self.mix, self.score = nn.Linear(4, 4, bias=False), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids[:, :4])
        x = self.query(x.transpose(1, 2).contiguous().transpose(1, 2)).tanh()
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return type("Output", (), {"logits": self.score(x.mean(1))})()


def test_inputs_that_are_not_contiguous(zoo: Any) -> None:
    real = zoo.base("bert")
    base = dataclasses.replace(real, model=Crossed().double().requires_grad_(False), heads=("score",))
    rows = [row for row in zoo.rows(real, 30, 0) if len(row.input_ids) > 3]
    jobs = []
    for k in range(2):
        torch.manual_seed(k)
        query = Pair(torch.randn(2, 8).double(), torch.randn(8, 2).double())
        mix = Pair(torch.randn(1, 4).double(), torch.randn(4, 1).double(), 0.5)
        jobs.append(Job(Adapter({"query": query, "mix": mix}), [rows[4 * k : 4 * k + 4]]))
    plain = [logits(base, job.adapter, job.batches[0]) for job in jobs]
    for job, got in zip(jobs, plain, strict=True):
        merged = dataclasses.replace(base, model=Crossed().double())
        merge(merged, job.adapter)
        torch.testing.assert_close(merged.logits(collate(job.batches[0], 0)), got, rtol=1e-9, atol=1e-9)

    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)

    for job, fused in zip(jobs, fit(base, jobs, sgd), strict=True):
        assert zoo.gap(fit(base, [job], sgd)[0].adapter, fused.adapter) < 1e-9


class Relative(nn.Module):
    """Like DeBERTa's attention: position embeddings of batch size 1 go through a projection, too."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.config = flat, SimpleNamespace(pad_token_id=0)
        self.embed, self.query = nn.Embedding(60, 8), nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.randn(1, 1, 8))
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids) * attention_mask[..., None]
        if self.flat:
            y = self.query(x.flatten(0, 1)).view(x.shape)
        else:
            y = self.query(x) + self.query(self.positions)
        return type("Output", (), {"logits": self.score(y.mean(1))})()


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_cannot_be_told_apart_are_refused_by_name_and_work_alone(zoo: Any, flat: bool) -> None:
    real = zoo.base("bert")
    base = dataclasses.replace(real, model=Relative(flat).requires_grad_(False), heads=("score",))
    pair = Pair(torch.randn(2, 8), torch.randn(8, 2))
    job = Job(Adapter({"query": pair}), [zoo.rows(real, 4, 0)])

    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)

    [alone] = fit(base, [job], sgd)
    assert not torch.equal(alone.adapter.pairs["query"].B, pair.B)
    with pytest.raises(ModelError, match=r"'query' is fed .* rows .* engine\.fuse=1"):
        fit(base, [job, job], sgd)
    assert clean(base)
