"""Places that a seed gives, and values at them."""

import subprocess
import sys

import pytest
import torch

from fedlora.models.parametrizations.sparse import places, spread


@pytest.mark.parametrize(("shape", "count"), [((5, 7), 1), ((5, 7), 12), ((5, 7), 35), ((300, 200), 4000)])
def test_places_are_sorted_different_and_inside(shape, count):
    found = places(3, "m", shape, count)
    assert found.dtype == torch.int64
    assert len(found) == count
    assert found.tolist() == sorted(set(found.tolist()))
    assert found.min() >= 0
    assert found.max() < shape[0] * shape[1]


def test_places_follow_seed_and_module_and_nothing_else():
    first = places(3, "m", (50, 60), 100)
    torch.manual_seed(1)
    assert torch.equal(places(3, "m", (50, 60), 100), first)
    assert not torch.equal(places(4, "m", (50, 60), 100), first)
    assert not torch.equal(places(3, "n", (50, 60), 100), first)


@pytest.mark.slow
def test_another_process_finds_the_same_places():
    code = f"from {places.__module__} import places; print(places(3, 'a.b', (50, 60), 20).tolist())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(places(3, "a.b", (50, 60), 20).tolist())


def test_places_are_uniform():
    counts = torch.zeros(40)
    for seed in range(2000):
        counts[places(seed, "m", (5, 8), 10)] += 1
    expected, spread_of_one = 500, (2000 * 0.25 * 0.75) ** 0.5
    assert (counts - expected).abs().max() < 4.5 * spread_of_one


def test_values_are_at_their_places_row_by_row_and_zero_elsewhere(make, rng):
    indices = torch.tensor([0, 4, 5, 14])
    values = make.tensor(rng, 4).requires_grad_()
    matrix = spread(values, indices, (3, 5))
    want = torch.zeros(3, 5, dtype=torch.float64)
    want[0, 0], want[0, 4], want[1, 0], want[2, 4] = values.detach()
    assert torch.equal(matrix, want)
    weight = make.tensor(rng, 3, 5)
    (matrix * weight).sum().backward()
    assert torch.equal(values.grad, weight.reshape(-1)[indices])
