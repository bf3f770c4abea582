"""One step: what is released, and that a record moves it by no more than the clip."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.privacy import Mechanism, Source
from fedlora.privacy.optimizer import PrivateOptimizer
from fedlora.privacy.settings import CLIPS

SHAPES = ((3, 4), (5,), ())


def private(
    sigma: float = 0.0, clip: float = 1.0, batch_size: int = 4, seed: str | None = None
) -> PrivateOptimizer:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    return Mechanism(sigma, clip, batch_size, Source(seed)).wrap(torch.optim.SGD(parameters, lr=1.0))


def random(rows: int, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [size * torch.randn(rows, *shape, generator=made) for shape in SHAPES]


def give(optimizer: PrivateOptimizer, *chunks: Sequence[Tensor]) -> None:
    for chunk in chunks:
        optimizer.add(optimizer.clip(dict(zip(optimizer.params, chunk, strict=True)), len(chunk[0])))


def released(optimizer: PrivateOptimizer, *chunks: Sequence[Tensor]) -> list[Tensor]:
    give(optimizer, *chunks)
    optimizer.release(sum(len(chunk[0]) for chunk in chunks))
    return [p.grad.clone() for p in optimizer.params]


def flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in grads]).double()


def test_the_sum_of_clipped_rows_over_the_expected_batch() -> None:
    rows = random(7, size=0.5)
    want = torch.zeros(sum(math.prod(s) for s in SHAPES), dtype=torch.float64)
    for i in range(7):
        own = flat([g[i] for g in rows])
        want += own * min(1.0, 0.8 / float(own.norm()))
    got = flat(released(private(clip=0.8, batch_size=3), rows))
    torch.testing.assert_close(got, want / 3, rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing() -> None:
    rows = random(7)
    one = flat(released(private(), rows))
    many = flat(released(private(), *([g[a:b] for g in rows] for a, b in ((0, 2), (2, 3), (3, 7)))))
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0, 30.0, 1e6, 1e15])
def test_a_record_more_or_less_moves_the_sum_by_no_more_than_the_clip(size: float) -> None:
    rows = random(6, size=1.0)
    for seed in range(20):
        new = random(1, seed=100 + seed, size=size)
        with_it = [torch.cat([g, n]) for g, n in zip(rows, new, strict=True)]
        clip = 0.7
        one = flat(released(private(clip=clip, batch_size=1), rows))
        other = flat(released(private(clip=clip, batch_size=1), with_it))
        assert float((one - other).norm()) <= clip * (1 + 1e-6)
        assert float((one - other).norm()) >= 0.99 * min(clip, float(flat(new).norm()))  # and not by less


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e15])
def test_no_record_is_over_a_clip_that_may_be_said(clip: float, size: float) -> None:
    for numbers in (1, 3000):
        p = nn.Parameter(torch.zeros(numbers))
        optimizer = Mechanism(0.0, clip, 1, Source()).wrap(torch.optim.SGD([p], lr=1.0))
        released(optimizer, [torch.full((1, numbers), size)])
        want = min(clip, size * math.sqrt(numbers))
        assert float(p.grad.double().norm()) <= clip * (1 + 1e-7)
        assert float(p.grad.double().norm()) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("numbers", [50_000, 2_700_000])
def test_no_record_of_many_like_numbers_is_over_the_clip(numbers: int) -> None:
    for size in (0.1, 0.137, 0.174):  # in float32 alone their norm comes out too small by up to 1.6e-3
        p = nn.Parameter(torch.zeros(numbers))
        optimizer = Mechanism(0.0, 0.5, 1, Source()).wrap(torch.optim.SGD([p], lr=1.0))
        released(optimizer, [torch.full((1, numbers), size)])
        assert 0.5 * (1 - 1e-4) < float(p.grad.double().norm()) <= 0.5


def test_the_norm_is_over_all_tensors_together() -> None:
    rows = [torch.full((1, *shape), 3.0) for shape in SHAPES]
    assert float(flat(released(private(batch_size=1), rows)).norm()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_row_that_is_not_finite_counts_as_zero(bad: float) -> None:
    rows = random(4)
    want = flat(released(private(), [g[:3] for g in rows]))
    rows[1][3, 2] = bad
    optimizer = private()
    got = flat(released(optimizer, rows))
    torch.testing.assert_close(got, want)
    assert optimizer.seen == 4


def test_no_row_at_all_is_a_step_of_noise_alone_that_is_counted() -> None:
    optimizer = private(sigma=2.0, clip=0.5, batch_size=10)
    found = torch.stack([flat(released(optimizer)) for _ in range(2000)])
    assert optimizer.steps == 2000
    assert float(found.std()) == pytest.approx(2.0 * 0.5 / 10, rel=5 / math.sqrt(2 * found.numel()))


def test_noise_is_sigma_times_clip_in_every_tensor_whatever_the_rows() -> None:
    sigma, clip, batch = 1e4, 1e-4, 7
    optimizer = private(sigma, clip, batch)
    found = torch.stack([flat(released(optimizer, random(3, seed=i))) for i in range(1500)])
    want = sigma * clip / batch
    per = found.std(0)
    assert float((per / want - 1).abs().max()) < 5 / math.sqrt(2 * len(found))
    assert float((torch.corrcoef(found.T) - torch.eye(found.shape[1])).abs().max()) < 5 / math.sqrt(
        len(found)
    )
    assert float(found.mean(0).abs().max()) < 5 * want / math.sqrt(len(found))


def test_the_noise_of_two_steps_and_of_two_optimizers_differs() -> None:
    optimizer = private(sigma=1.0)
    rows = random(2)
    first, second = flat(released(optimizer, rows)), flat(released(optimizer, rows))
    torch.manual_seed(0)
    third = flat(released(private(sigma=1.0), rows))
    torch.manual_seed(0)
    fourth = flat(released(private(sigma=1.0), rows))
    for one, other in ((first, second), (second, third), (third, fourth)):
        assert not torch.allclose(one, other)
    assert torch.equal(
        flat(released(private(1.0, seed="x"), rows)), flat(released(private(1.0, seed="x"), rows))
    )


def test_other_rows_than_went_in_release_nothing() -> None:
    rows = random(4)
    for wrong in (3, 5, 0, 64):
        optimizer = private()
        give(optimizer, rows)
        with pytest.raises(ModelError, match="records went in"):
            optimizer.release(wrong)
        assert all(p.grad is None for p in optimizer.params)
        assert optimizer.steps == 0
    for i in range(len(SHAPES)):  # one tensor alone
        optimizer = private()
        found = dict(zip(optimizer.params, rows, strict=True))
        found[optimizer.params[i]] = rows[i][:3]
        with pytest.raises(ModelError, match="records went in" if i else "gradients of 3"):
            optimizer.clip(found, 4)


def test_a_tensor_without_gradients_releases_nothing() -> None:
    optimizer = private()
    found = dict(zip(optimizer.params, random(4), strict=True))
    for nothing in (None, found.pop(optimizer.params[1])[:0]):
        with pytest.raises(ModelError, match="gradients of 0"):
            optimizer.clip({**found, optimizer.params[1]: nothing}, 4)
    with pytest.raises(ModelError, match="gradients of 0"):
        optimizer.clip(found, 4)


def test_rows_are_used_once() -> None:
    optimizer = private()
    released(optimizer, random(4))
    with pytest.raises(ModelError, match="records went in"):
        optimizer.release(4)
