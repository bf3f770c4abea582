"""DP-SGD of clients in stacks: each gets what it gets by itself, to the bit of its noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from private_jobs import CLIENT, CLIENTS, compare, job, jobs, trained
from small_models import base_of

from fedlora.models import targets
from fedlora.models.products import Grouped, OneByOne, Products
from fedlora.training.rules import RankPruning
from fedlora.training.steps import Parameters
from fedlora.training.trainer import fit

pytestmark = pytest.mark.slow  # whole runs

WAYS = [(OneByOne(), torch.float64, 1e-10), (Grouped(), torch.float32, 2e-4)]


@pytest.mark.parametrize(("way", "dtype", "tol"), WAYS, ids=["one by one", "grouped"])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_each_client_is_trained_as_by_itself(
    family: str, way: Products, dtype: torch.dtype, tol: float
) -> None:
    base = base_of(family, dtype)
    client = replace(CLIENT, micro_tokens=20, schedule="cosine")
    apart = [trained(base, [jobs(base)[k]], client)[0] for k in range(len(CLIENTS))]
    together = trained(replace(base, products=way), jobs(base), client)
    alone = trained(replace(base, products=way), [jobs(base)[2]], client)[0]
    for one, other in zip(together, apart, strict=True):
        compare(one, other, tol)
    compare(alone, apart[2], tol)
    assert together[0].clipped is not None
    assert 0 < together[0].clipped <= 1


def test_the_noise_is_that_of_the_client_alone_to_the_bit() -> None:
    base = base_of("Bert", torch.float32)
    work = [job(base, seed, rank, (0, 0)) for seed, rank in enumerate((3, 16, 8))]
    apart = [trained(base, [one])[0] for one in work]
    again = [job(base, seed, rank, (0, 0)) for seed, rank in enumerate((3, 16, 8))]
    for one, other, own in zip(trained(replace(base, products=Grouped()), again), apart, work, strict=True):
        assert one.adapter.digest() == other.adapter.digest() != own.task.adapter.digest()


def test_what_is_not_trained_stays_and_gets_no_noise() -> None:
    base = base_of("Bert", torch.float32)
    frozen = frozenset({sorted(targets(base, "all-linear"))[0]})
    more: dict[str, Any] = {"train": frozenset({"B", "head"}), "frozen": frozen}
    apart = [trained(base, [jobs(base, **more)[k]])[0] for k in range(3)]
    together = trained(replace(base, products=Grouped()), jobs(base, **more))
    for one, other, own in zip(together, apart, jobs(base, **more), strict=False):
        compare(one, other, 2e-4)
        before, after = dict(own.task.adapter.tensors()), dict(one.adapter.tensors())
        for name in before:
            assert torch.equal(before[name], after[name]) == (name not in set(own.task.trained())), name


def test_a_rule_s_term_comes_after_the_noise() -> None:
    base = base_of("Llama", torch.float64)
    more = {"method": (RankPruning(0.5, 10.0, 1),)}
    for one, k in zip(
        trained(replace(base, products=OneByOne()), jobs(base, **more)), range(3), strict=False
    ):
        compare(one, trained(base, [jobs(base, **more)[k]])[0], 1e-10)


class Mine(torch.optim.SGD):
    """An optimizer of which nobody knows what it does."""


def test_an_optimizer_of_the_user_s_own_moves_noised_gradients_client_by_client() -> None:
    base = base_of("Bert", torch.float64)

    def make(groups: Parameters) -> torch.optim.Optimizer:
        return Mine([p for found in groups.values() for p in found], lr=0.1)

    apart = [fit(base, [jobs(base)[k]], make)[0] for k in range(len(CLIENTS))]
    for one, other in zip(fit(replace(base, products=OneByOne()), jobs(base), make), apart, strict=True):
        compare(one, other, 1e-10)
