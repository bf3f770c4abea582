"""Objects come out of Ray's object store as they went in, and the base's weights without a copy."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.data import Example
from fedlora.models import Base, load
from fedlora.models.packaged import tiny

pytest.importorskip("ray")
from fedlora.engines.packed import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(6).reshape(2, 3) if shape == (2, 3) else torch.ones(shape)).to(dtype)
    found = unpack(pack({"x": tensor}))["x"]
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_tensors_that_are_one_stay_one() -> None:
    tensor, part = torch.ones(3), nn.Parameter(torch.ones(2, 2).T[:1])
    a, b, c, d = unpack(pack((tensor, tensor, part, part)))
    assert a is b
    assert c is d
    assert torch.equal(c, part)
    assert c.requires_grad


def test_frozen_weights_lie_over_the_bytes_that_are_lent_and_all_else_is_a_copy() -> None:
    frozen, trained = nn.Parameter(torch.ones(4), False), nn.Parameter(torch.ones(4))
    packed = pack((frozen, trained, torch.ones(4)))
    found: Any = unpack(packed)
    starts = [data.__array_interface__["data"][0] for data in packed.tensors]
    assert [tensor.data_ptr() == start for tensor, start in zip(found, starts, strict=True)] == [
        True,
        False,
        False,
    ]
    assert [tensor.requires_grad for tensor in found] == [False, True, False]


def test_what_an_object_takes_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(nn.Parameter(torch.zeros(1000), False))
    assert 4000 < packed.nbytes < 5000
    assert isinstance(packed.rest, np.ndarray)


def test_a_base_gives_the_same_logits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    base = load(tiny(), "classification", ("no", "yes"))
    found: Base = unpack(pack(base))
    assert found.after in [*found.model.modules()]  # a module of its own model, not of another one
    rows = [Example(list(range(2, 9)), 0), Example([5, 6], 1)]
    assert torch.equal(found.logits(found.collate(rows)), base.logits(base.collate(rows)))
    assert found.fingerprint() == base.fingerprint()
