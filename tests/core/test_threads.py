"""One thread for factorisations, and as many as before afterwards."""

import pytest
import torch

from fedlora.core.adapter import Pair
from fedlora.core.algebra import compress, error_and_norm, pad_orthonormal, singular_values
from fedlora.core.threads import one_thread


def test_threads_are_as_before_after_work_and_after_a_failure() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            with one_thread():
                assert torch.get_num_threads() == 1
        with pytest.raises(ZeroDivisionError), one_thread():
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_factorisation_is_split_over_threads(monkeypatch: pytest.MonkeyPatch, rng) -> None:
    used: list[int] = []
    for name in ("qr", "svd", "svdvals"):
        real = getattr(torch.linalg, name)

        def spied(*args, _real=real, **named):
            used.append(torch.get_num_threads())
            return _real(*args, **named)

        monkeypatch.setattr(torch.linalg, name, spied)
    pair = Pair(torch.randn(3, 40), torch.randn(50, 3), 2.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compress(pair, 2)
        singular_values(pair)
        error_and_norm([pair, pair], [0.5, 0.5], pair)
        pad_orthonormal(pair, 5, rng)
    finally:
        torch.set_num_threads(before)
    assert len(used) >= 8
    assert set(used) == {1}
