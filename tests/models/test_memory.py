"""Checkpointed layers compute what they compute; what does not fit is done again, smaller."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from small_models import base_of

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ModelError
from fedlora.models import Base, load_given, targets
from fedlora.models.checkpointing import checkpointed
from fedlora.models.memory import LEAST, MOST, Memory, fitting
from fedlora.models.packaged import tiny
from fedlora.models.products import Grouped
from fedlora.tasks import Classification
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit


def decoder() -> Base:
    return base_of("Llama", torch.float32, num_hidden_layers=3)


def jobs(base: Base, lengths: tuple[int, ...] = (5, 9, 2, 12)) -> list[FitJob]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for rank in (2, 5):
        pairs = {
            n: Pair(torch.randn(rank, i, generator=draw) / 4, torch.randn(o, rank, generator=draw) / 4)
            for n, (o, i) in targets(base, "all-linear").items()
        }
        rows = []
        for length in lengths:
            ids = torch.randint(3, 60, (length,), generator=draw).tolist()
            rows.append(Example(ids, [-100, *ids[1:]]))
        found.append(FitJob(Task(Adapter(pairs)), [rows[:2], rows[2:]]))
    return found


def trained(base: Base, work: list[FitJob], **more: Any) -> list[torch.Tensor]:
    client = LocalTraining(lr=0.1, optimizer=lambda groups: torch.optim.SGD(groups), **more)
    found = fit(base, work, client.make_optimizer, client.rate_factor, client.clip, client.micro_tokens)
    return [tensor for one in found for _, tensor in one.adapter.tensors()]


class Counted:
    """Calls of a layer's attention, there and on the way back."""

    def __init__(self, base: Base) -> None:
        self.calls = 0
        base.model.model.layers[1].self_attn.register_forward_hook(self.count)

    def count(self, *args: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointed_layers_train_the_same_and_are_computed_twice(packed: bool, stacked: bool) -> None:
    base = decoder()
    base = dataclasses.replace(
        base, packing=base.packing if packed else None, products=Grouped() if stacked else None
    )
    work = jobs(base)
    calls = Counted(base)
    plain = trained(base, work)
    once = calls.calls
    lean = dataclasses.replace(base, memory=Memory(checkpointing=True))
    for one, other in zip(trained(lean, work), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert calls.calls == 3 * once
    assert not base.model.model.layers[0].training  # as it was


def test_the_way_back_may_run_in_another_thread() -> None:
    """As on a GPU, where autograd has a thread of its own."""
    import threading

    base = decoder()
    plain = trained(base, jobs(base))
    lean = dataclasses.replace(base, memory=Memory(checkpointing=True))
    real = torch.autograd.grad

    def elsewhere(*args: Any, **named: Any) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(real(*args, **named)))
        thread.start()
        thread.join()
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", elsewhere)
        for one, other in zip(trained(lean, jobs(base)), plain, strict=True):
            torch.testing.assert_close(one, other)


def test_a_model_without_such_layers_cannot_be_asked_for_it() -> None:
    with checkpointed(torch.nn.Linear(2, 2)) as layers:
        assert layers == 0


def test_gradient_checkpointing_is_tried_on_the_model_and_used() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny(), num_labels=2)
    assert load_given(model, tokenizer, Classification(), gradient_checkpointing=True).memory.checkpointing
    assert not load_given(model, tokenizer, Classification()).memory.checkpointing
    for layer in model.modules():
        if hasattr(layer, "gradient_checkpointing"):
            type(layer).gradient_checkpointing = False
    with pytest.MonkeyPatch.context() as patch:
        from transformers import modeling_layers

        patch.setattr(modeling_layers, "GradientCheckpointingLayer", Counted)  # no layer is one
        with pytest.raises(ModelError, match="no layers that transformers can checkpoint"):
            load_given(model, tokenizer, Classification(), gradient_checkpointing=True)


class Small:
    """A device that is full beyond so many tokens, or rows of them, of a pass."""

    def __init__(self, base: Base, tokens: int, backward: bool = False) -> None:
        self.tokens, self.sizes, self.backward = tokens, list[int](), backward
        base.model.model.layers[1].register_forward_hook(self.look)

    def look(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        size = output.shape[0] * output.shape[1]
        self.sizes.append(size)
        if size <= self.tokens:
            return output
        if not self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory")
        output.register_hook(self.full)
        return output

    def full(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_what_does_not_fit_is_done_again_in_halves_with_the_same_result(
    backward: bool, stacked: bool
) -> None:
    base = dataclasses.replace(decoder(), products=Grouped() if stacked else None)
    plain = trained(base, jobs(base), micro_tokens=1000)
    work = jobs(base)
    device = Small(base, 15, backward)
    with pytest.warns(UserWarning, match=r"28 tokens do not fit the memory of cpu; 14 from now on"):
        found = trained(base, work, micro_tokens=1000)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert base.memory.tokens == 14
    device.sizes.clear()
    trained(base, work, micro_tokens=1000)
    assert max(device.sizes) <= 14  # it has learnt


@pytest.mark.filterwarnings("ignore:micro-batches")
def test_a_row_that_does_not_fit_is_checkpointed_then_refused_by_name() -> None:
    base = dataclasses.replace(decoder(), memory=Memory(checkpoints=True))
    work = jobs(base)
    Small(base, 4)
    with (
        pytest.warns(UserWarning, match=r"a row of \d+ tokens .*gradient_checkpointing"),
        pytest.raises(ModelError, match=r"a row of \d+ tokens does not fit .* data\.max_length"),
    ):
        trained(base, work)
    assert base.memory.checkpointing


@pytest.mark.parametrize(
    ("tokens", "taken", "free", "wanted"),
    [
        (1000, 10**9, 10**10, 4096),
        (1000, 10**9, 10**13, MOST),
        (1000, 10**12, 10**9, LEAST),
        (7, 0, 0, LEAST),
    ],
)
def test_a_budget_is_a_power_of_two_of_what_fits(tokens: int, taken: int, free: int, wanted: int) -> None:
    assert fitting(tokens, taken, free) == wanted
