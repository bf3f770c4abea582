"""Cross-entropy in pieces: the losses, hits and gradients of all logits at once."""

import dataclasses
from typing import Any

import pytest
import torch
from small_models import GROUPED, base_of
from torch import nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, MultiAdapterModel, packing, targets
from fedlora.models.token_losses import cross_entropy, cross_entropy_in_pieces
from fedlora.training.evaluation import losses_of


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("piece", [1, 20, 33, 10**6])
def test_pieces_of_any_size_give_what_all_logits_give(piece: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 11, bias=bias).double().requires_grad_(False)
    states = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    wanted, weights = torch.randint(11, (13,)), torch.randn(13, dtype=torch.float64)
    whole, right = cross_entropy(layer(states), wanted)
    (gradient,) = torch.autograd.grad(whole @ weights, states)
    losses, hits = cross_entropy_in_pieces(states, layer, wanted, piece)
    (found,) = torch.autograd.grad(losses @ weights, states)
    torch.testing.assert_close(losses, whole)
    assert torch.equal(hits, right)
    torch.testing.assert_close(found, gradient)


def test_a_model_s_losses_and_gradients_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("Llama")
    assert base.packing is not None
    assert base.packing.vocabulary is base.model.lm_head
    draw = torch.Generator().manual_seed(1)
    pairs = {
        n: Pair(torch.randn(2, i, generator=draw).double(), torch.randn(o, 2, generator=draw).double())
        for n, (o, i) in targets(base, "all-linear").items()
    }
    rows = []
    for length in (5, 1, 7):
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        rows.append(Example(ids, [-100, *ids[1:]]))

    def run(base: Base) -> list[torch.Tensor]:
        with MultiAdapterModel(base, [Task(Adapter(pairs))], train=True) as bank:
            losses, right = losses_of(base, bank, [(0, row) for row in rows], 1)
            return [losses, right, *(g for _, g in bank.gradients(losses.sum(), [0]) if g is not None)]

    whole = run(base)
    monkeypatch.setattr(packing, "PIECE", 4 * 60)
    pieces = run(base)
    plain = run(dataclasses.replace(base, packing=None))
    assert len(whole) == len(pieces) == len(plain) > 10
    for one, two, three in zip(whole, pieces, plain, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


@pytest.mark.parametrize(
    ("family", "more"),
    [("Granite", {"logits_scaling": 4.0}), ("Cohere", {"logit_scale": 0.25})],
)
def test_where_logits_are_changed_after_the_output_layer_they_are_made_in_one_piece(
    family: str, more: dict[str, Any]
) -> None:
    found = base_of(family, **GROUPED, **more).packing
    assert found is not None
    assert found.vocabulary is None
