import pytest
import torch

from fedlora.core import algebra
from fedlora.core.adapter import Adapter

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)


CALLS = {
    "mean_tensors": lambda p, q, rng: algebra.mean_tensors([p.A, q.A], [0.5, 0.5]),
    "mean_extras": lambda p, q, rng: algebra.mean_extras([{"w": p.A}, {"w": q.A}], [0.5, 0.5]),
    "mean_factors": lambda p, q, rng: algebra.mean_factors([p, q], [0.5, 0.5]),
    "mean_rows": lambda p, q, rng: algebra.mean_rows([p.A, q.A[:1]], [0.5, 0.5], p.A),
    "held": lambda p, q, rng: algebra.held([p.rank, 1], [0.5, 0.5], 4),
    "accumulate": lambda p, q, rng: algebra.accumulate(algebra.accumulate(None, p), q),
    "of_dense": lambda p, q, rng: algebra.of_dense(p.A),
    "negative": lambda p, q, rng: algebra.negative(p),
    "rescale": lambda p, q, rng: algebra.rescale(p, 7.0),
    "stack": lambda p, q, rng: algebra.stack([p, q], [0.5, 0.5]),
    "residual": lambda p, q, rng: algebra.residual([p], [0.5], q),
    "error_and_norm": lambda p, q, rng: algebra.error_and_norm([p], [0.5], q),
    "weighted_sum": lambda p, q, rng: algebra.weighted_sum([p, q], [0.5, 0.5], 5.0),
    "dense": lambda p, q, rng: algebra.dense(p),
    "pad": lambda p, q, rng: algebra.pad(p, 9),
    "truncate": lambda p, q, rng: algebra.truncate(p, 1),
    "beyond": lambda p, q, rng: algebra.beyond(p, 1),
    "norm": lambda p, q, rng: algebra.norm(p),
    "singular_values": lambda p, q, rng: algebra.singular_values(p),
    "effective_rank": lambda p, q, rng: algebra.effective_rank(p),
    "compress": lambda p, q, rng: algebra.compress(p, 2, 5.0),
    "pad_orthonormal": lambda p, q, rng: algebra.pad_orthonormal(p, 9, rng),
}


@DTYPES
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_mutated_by(make, rng, call, dtype):
    pairs = {"p": make.pair(rng, 5, 6, 3, 2.0, dtype), "q": make.pair(rng, 5, 6, 3, 0.5, dtype)}
    both = Adapter(pairs)
    before = both.digest()
    call(both.pairs["p"], both.pairs["q"], rng)
    assert both.digest() == before


def test_every_public_function_is_in_the_list_of_pure_ones():
    own = {
        n
        for n, f in vars(algebra).items()
        if callable(f) and getattr(f, "__module__", "") == algebra.__name__
    }
    assert {name for name in own if not name.startswith("_")} == {*CALLS, "normalised"}
