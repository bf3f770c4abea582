import pytest
import torch
from torch import Tensor

from fedlora.models.low_rank import add_low_rank

SEGMENTS = {"one": [(0, 5)], "three": [(0, 2), (2, 3), (3, 5)], "one empty": [(0, 2), (2, 2), (2, 5)]}
SHAPES = {"rows": (5, 4), "rows of tokens": (5, 3, 4), "end to end": (1, 5, 4)}
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
        return add_low_rank(y.clone(), x, 5, parts, SCALES, list(factors))  # in place, and so on a copy

    assert torch.autograd.gradcheck(add, (y, x, *own))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_each_segment_is_scale_times_its_own_product(shape: str, segments: str) -> None:
    parts = SEGMENTS[segments]
    own, x = factors(parts), torch.randn(SHAPES[shape], dtype=torch.float64)
    before = torch.randn((*x.shape[:-1], 6), dtype=torch.float64)
    y = add_low_rank(before.clone(), x, 5, parts, SCALES, own)
    if shape == "end to end":
        x, y, before = x[0], y[0], before[0]
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
    y = add_low_rank(zero.bfloat16(), x, 5, parts, SCALES, own)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert own[0].grad.dtype == torch.float32
    exact = add_low_rank(zero, x.detach().float(), 5, parts, SCALES, own)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0)
