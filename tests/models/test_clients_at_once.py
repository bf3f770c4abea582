"""K clients at once give what each gives alone, and what a plain PEFT loop gives."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, load_adapter, save_adapter
from fedlora.training.steps import FitJob, Parameters
from fedlora.training.trainer import fit

# PEFT 0.21 asks transformers 5.23 for a property that it renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ALL = ("bert", "roberta", "llama", "gpt2")
RANKS = (1, 2, 5, 20)  # 20 is more than any layer's smaller side
SCALES = (2.0, 0.5, 1.3, 3.0)
BATCHES = (6, 3, 5, 1)  # some clients stop early
SIZES = (3, 4, 1, 5)
CLIP = 0.3

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.2, momentum=0.5),
    # By the default eps, a first step is lr times a sign, which the rounding of a small gradient turns.
    "adamw": partial(torch.optim.AdamW, lr=0.01, eps=1e-4),
}


def make(name: str) -> Callable[[Parameters], torch.optim.Optimizer]:
    return lambda groups: OPTIMIZERS[name]([{"params": found} for found in groups.values()])


def linear(step: int, steps: int) -> float:
    """Two steps of warmup, then down to almost zero."""
    return (step + 1) / 3 if step < 2 else 1 - (step - 2) / max(1, steps - 2)


def jobs(zoo: Any, base: Base, head: bool = True, train: frozenset[str] = frozenset("AB")) -> list[FitJob]:
    found = []
    for client, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True)):
        rows = zoo.rows(base, BATCHES[client] * SIZES[client], seed=client)
        size = SIZES[client]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        batches[-1] = batches[-1][: max(1, size - 2)]  # the last batch is smaller
        task = Task(zoo.adapter(base, rank, scale, seed=client, head=head), train)
        found.append(FitJob(task, batches))
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ALL)
def test_k_at_once_equals_one_by_one_in_float64(zoo: Any, name: str, optimizer: str) -> None:
    base = zoo.base(name, double=True)
    work = jobs(zoo, base)
    train = partial(fit, base, make_optimizer=make(optimizer), schedule=linear, clip=CLIP)
    together = train(jobs=work, tokens=40)
    for job, fused in zip(work, together, strict=True):
        [alone] = train(jobs=[job], tokens=10**6)
        assert zoo.gap(alone.adapter, fused.adapter) < 1e-9
        assert fused.loss == pytest.approx(alone.loss, rel=1e-9)
        assert fused.steps == alone.steps == len(job.batches)
        assert zoo.gap(job.task.adapter, fused.adapter) > 1e-3  # it moved


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ALL)
def test_one_step_at_once_equals_one_by_one_in_float32(zoo: Any, name: str, optimizer: str) -> None:
    base = zoo.base(name)
    work = [FitJob(job.task, job.batches[:1]) for job in jobs(zoo, base)]
    train = partial(fit, base, make_optimizer=make(optimizer), clip=CLIP)
    for job, fused in zip(work, train(jobs=work), strict=True):
        [alone] = train(jobs=[job])
        assert zoo.gap(alone.adapter, fused.adapter) < 1e-5


@pytest.mark.parametrize("name", ["distilbert", "bert-mlm", "llama-cls", "gpt2-cls"])
def test_other_heads_at_once_equal_one_by_one(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    work = jobs(zoo, base)
    train = partial(fit, base, make_optimizer=make("sgd"), schedule=linear, clip=CLIP, tokens=60)
    for job, fused in zip(work, train(jobs=work), strict=True):
        assert zoo.gap(train(jobs=[job])[0].adapter, fused.adapter) < 1e-9


def test_the_clipping_of_these_tests_clips_and_does_so_for_each_client(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    work = [FitJob(job.task, job.batches[:1]) for job in jobs(zoo, base)]
    plain = partial(torch.optim.SGD, lr=1.0)

    def lengths(clip: float | None) -> list[float]:
        fitted = fit(
            base, work, lambda groups: plain([p for found in groups.values() for p in found]), clip=clip
        )
        return [moved(job.task.adapter, one.adapter) for job, one in zip(work, fitted, strict=True)]

    assert min(lengths(None)) > CLIP
    assert lengths(CLIP) == pytest.approx([CLIP] * len(work), rel=1e-4)


def moved(before: Adapter, after: Adapter) -> float:
    old, new = dict(before.tensors()), dict(after.tensors())
    return float(sum((new[n] - old[n]).square().sum() for n in old).sqrt())


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_the_size_of_a_micro_batch_changes_nothing(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    work = jobs(zoo, base)
    results = [fit(base, work, make("sgd"), linear, CLIP, tokens) for tokens in (1, 30, 10**6)]
    for one, other, third in zip(*results, strict=True):
        assert zoo.gap(one.adapter, other.adapter) < 1e-9
        assert zoo.gap(one.adapter, third.adapter) < 1e-9
        assert one.loss == pytest.approx(third.loss, rel=1e-9)


def reference(
    zoo: Any, base: Base, job: FitJob, folder: Path, optimizer: str, clip: float, double: bool
) -> tuple[Adapter, float]:
    """The same training by plain PEFT and torch: one unpadded row at a time, their mean a step."""
    save_adapter(job.task.adapter, base, folder / "start")
    model = PeftModel.from_pretrained(zoo.plain(base), str(folder / "start"), is_trainable=True).eval()
    if double:
        model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = OPTIMIZERS[optimizer](trained)
    rate, total = chosen.param_groups[0]["lr"], 0.0
    for step, batch in enumerate(job.batches):
        losses = [row_loss(model, base, row) for row in batch]
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        chosen.param_groups[0]["lr"] = rate * linear(step, len(job.batches))
        chosen.step()
        chosen.zero_grad()
        total += loss.item()
    model.save_pretrained(str(folder / "end"))
    return load_adapter(folder / "end", base), total / len(job.batches)


def row_loss(model: Any, base: Base, row: Example) -> torch.Tensor:
    ids = torch.tensor([row.input_ids])
    logits = model(input_ids=ids).logits[0]
    if base.task.labelled:
        return F.cross_entropy(logits, torch.tensor(row.target))
    return F.cross_entropy(logits[:-1], torch.tensor(row.target[1:]))  # transformers' own computes in float32


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", [*ALL, "llama-cls"])
def test_a_client_equals_a_plain_peft_loop(zoo: Any, tmp_path: Path, name: str, optimizer: str) -> None:
    base = zoo.base(name, double=True)
    job = jobs(zoo, base)[1]
    [ours] = fit(base, [job], make(optimizer), linear, CLIP)
    theirs, loss = reference(zoo, base, job, tmp_path, optimizer, CLIP, double=True)
    assert zoo.gap(theirs, ours.adapter) < 1e-9
    assert ours.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_client_equals_a_plain_peft_loop_in_float32(zoo: Any, tmp_path: Path, name: str) -> None:
    base = zoo.base(name)
    job = jobs(zoo, base)[2]
    [ours] = fit(base, [job], make("sgd"), linear, CLIP)
    theirs, loss = reference(zoo, base, job, tmp_path, "sgd", CLIP, double=False)
    assert zoo.gap(theirs, ours.adapter) < 1e-5
    assert ours.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_is_bit_identical_and_the_rest_moves(zoo: Any, frozen: str) -> None:
    base = zoo.base("bert")
    work = jobs(zoo, base, train=frozenset({"A", "B"} - {frozen}))
    for job, one in zip(work, fit(base, work, make("adamw"), clip=CLIP), strict=True):
        before, after = dict(job.task.adapter.tensors()), dict(one.adapter.tensors())
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) == name.endswith(f".{frozen}"), name


def test_a_frozen_head_stays_out_and_the_base_head_is_used(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    work = jobs(zoo, base, head=False)
    fitted = fit(base, work, make("sgd"))
    full = [FitJob(Task(Adapter(job.task.adapter.pairs, base.head_state())), job.batches) for job in work]
    frozen = fit(base, full, lambda groups: OPTIMIZERS["sgd"](groups["A"] + groups["B"]))
    for job, one, other in zip(work, fitted, frozen, strict=True):
        assert one.adapter.extra == {}
        assert zoo.gap(Adapter(job.task.adapter.pairs), one.adapter) > 1e-3
        assert zoo.gap(Adapter(other.adapter.pairs), one.adapter) < 1e-12


def test_another_client_s_rows_have_no_influence(zoo: Any) -> None:
    base = zoo.base("bert", double=True)
    work = jobs(zoo, base)
    before = fit(base, work, make("adamw"), clip=CLIP)
    rows = zoo.rows(base, 30, seed=77, longest=20)
    work[1] = FitJob(Task(zoo.adapter(base, 7, 9.0, seed=77)), [rows[i : i + 6] for i in range(0, 30, 6)])
    after = fit(base, work, make("adamw"), clip=CLIP)
    for client in (0, 2, 3):
        assert zoo.gap(before[client].adapter, after[client].adapter) < 1e-9
    assert before[1].loss != after[1].loss


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_client_of_nan_poisons_only_itself(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    work = jobs(zoo, base)
    before = fit(base, work, make("adamw"), clip=CLIP)
    bad = zoo.adapter(base, 2, 1.0, seed=1)
    next(iter(bad.pairs.values())).A.fill_(torch.nan)
    work[1] = FitJob(Task(bad), work[1].batches)
    after = fit(base, work, make("adamw"), clip=CLIP)
    assert not torch.isfinite(next(iter(after[1].adapter.pairs.values())).A).any()
    for client in (0, 2, 3):
        assert zoo.gap(before[client].adapter, after[client].adapter) < 1e-9


def test_a_client_without_batches_comes_back_as_it_went(zoo: Any) -> None:
    base = zoo.base("bert")
    work = jobs(zoo, base)
    work[2] = FitJob(work[2].task, [])
    fitted = fit(base, work, make("adamw"))
    assert fitted[2].adapter.digest() == work[2].task.adapter.digest()
    assert fitted[2].steps == 0


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was(zoo: Any, name: str) -> None:
    base = zoo.base(name, double=True)
    work, before = jobs(zoo, base), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append(fit(base, work, make("adamw"), linear, CLIP, tokens=30))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, three, again in zip(*results, strict=True):
        assert zoo.gap(one.adapter, three.adapter) < 1e-9
        assert three.adapter.digest() == again.adapter.digest()
