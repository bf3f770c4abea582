"""What is found out about a model when it is loaded."""

from typing import Any

import torch
from torch import nn

from fedlora.data import Example
from fedlora.models import Traits
from fedlora.models.state import put_back
from fedlora.training.batches import micro_batches


class Keeps(nn.Module):
    """Writes into its own attribute and into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.state: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = x
        self.seen.add_(1)
        return x


def test_what_a_pass_writes_is_found_and_put_back() -> None:
    model = Keeps()
    with put_back(model) as kept:
        assert not kept.changed
        model(torch.ones(2))
        assert kept.changed
    assert model.state is None
    assert torch.equal(model.seen, torch.zeros(2))


def test_rows_beyond_the_limit_meet_only_rows_of_their_length() -> None:
    rows = [(0, Example([1] * n, 0)) for n in (30, 30, 20, 16, 9, 3)]
    found = micro_batches(rows, 1000, Traits(limit=16))
    assert sorted(sorted(len(row.input_ids) for _, row in micro) for micro in found) == [
        [3, 9, 16],
        [20],
        [30, 30],
    ]
    assert len(micro_batches(rows, 1000, Traits(alone=True))) == len(rows)
    assert len(micro_batches(rows, 1000, Traits())) == 1
