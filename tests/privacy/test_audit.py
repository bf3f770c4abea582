"""The audit lets right code pass, and sees the mistakes that it is for; its bound is one."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.privacy import Plan, Source
from fedlora.privacy.audit_bound import lower_bound, p_value
from fedlora.privacy.optimizer import PrivateOptimizer
from fedlora.runner.audit import Audit, Reading, _guess, audit, report

pytestmark = pytest.mark.slow  # whole runs

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def right() -> Audit:
    return audit()


def verdicts(found: Audit) -> dict[str, bool]:
    return {text.split()[0]: good for good, text in found.findings()}


def noise_times(monkeypatch: Patch, factor: float) -> None:
    normals = Source.normals
    monkeypatch.setattr(Source, "normals", lambda self, *given: factor * normals(self, *given))


def clip_times(monkeypatch: Patch, factor: float) -> None:
    clip = PrivateOptimizer.clip

    def wide(self: Any, *given: Any) -> Any:
        self.max_grad_norm *= factor
        found = clip(self, *given)
        self.max_grad_norm /= factor
        return found

    monkeypatch.setattr(PrivateOptimizer, "clip", wide)


def test_right_code_passes_though_its_canaries_show(right: Audit) -> None:
    assert right.passed, "\n".join(report(right))
    assert 0.9 < right.claimed <= 1
    assert right.delta == 1e-5
    assert (right.counted, right.steps, right.guesses, right.canaries) == (50, 50, 400, 4000)
    assert right.guesses / 2 < right.right
    assert right.lower < right.claimed
    assert "nothing contradicts" in report(right)[0]
    assert all(line.startswith("ok ") for line in report(right)[1:])


def test_no_seed_repeats_the_noise() -> None:
    one, two = (audit(rounds=1, canaries=1000, batch_size=200, seed=3) for _ in range(2))
    assert one.noise != two.noise
    assert one.signal != two.signal


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_guesses_and_noise_show_that_noise_is_missing_or_a_quarter(monkeypatch: Patch, factor: float) -> None:
    noise_times(monkeypatch, factor)
    found = audit()
    assert found.lower > found.claimed
    assert found.noise.ratio == pytest.approx(factor, abs=0.02)
    assert verdicts(found) == {"ledger": True, "guesses": False, "noise": False, "signal": True}
    assert "FAILED" in report(found)[0]


def test_noise_shows_that_it_is_a_half(monkeypatch: Patch) -> None:
    noise_times(monkeypatch, 0.5)
    found = audit()
    assert found.noise.ratio == pytest.approx(0.5, abs=0.03)
    assert not found.passed


def test_guesses_and_signal_show_that_nothing_is_clipped(monkeypatch: Patch) -> None:
    clip_times(monkeypatch, 1e6)
    found = audit()
    assert found.lower > 2 * found.claimed
    assert verdicts(found) == {"ledger": True, "guesses": False, "noise": True, "signal": False}


def test_signal_shows_a_clip_twice_too_large(monkeypatch: Patch) -> None:
    clip_times(monkeypatch, 2.0)
    found = audit()
    assert not verdicts(found)["signal"]
    assert found.signal.ratio == pytest.approx(2, abs=0.5)


def test_the_sum_of_rounds_shows_noise_that_comes_back(monkeypatch: Patch) -> None:
    drawn = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr(Source, "normals", lambda self, *given: drawn.clone())
    found = audit(steps=1)  # each round's noise is as it should be, by itself
    assert found.noise.ratio == pytest.approx(math.sqrt(5), rel=0.1)
    assert not verdicts(found)["noise"]


def test_a_ledger_that_forgets_rounds_shows(monkeypatch: Patch) -> None:
    after = Plan.after
    monkeypatch.setattr(Plan, "after", lambda self, spent: after(self, None))
    found = audit()
    assert (found.counted, found.steps) == (10, 50)
    assert not verdicts(found)["ledger"]
    assert "10 of 50 steps" in "\n".join(report(found))


def test_what_is_no_number_or_no_random_noise_does_not_pass(right: Audit) -> None:
    assert not replace(right, noise=Reading(math.nan, math.nan)).passed
    assert not replace(right, valid=False).passed
    assert "NOT VALID" in "\n".join(report(replace(right, valid=False)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"canaries": 100}, "canaries"), ({"epsilon": 0}, "epsilon"), ({"batch_size": 9000}, "batch_size")],
)
def test_what_cannot_be_audited_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        audit(**settings)


def test_p_values_are_those_by_hand() -> None:
    assert p_value(1, 2, 2, 0.0, 0.0) == pytest.approx(3 / 4)
    assert p_value(2, 2, 2, 0.0, 0.0) == pytest.approx(1 / 4)
    # f is 1, 3/4, 1/4 at 0, 1, 2, so that the steepest of (3/4 - 1/4) / 1 and (1 - 1/4) / 2 is 1/2
    assert p_value(2, 2, 10, 0.0, 0.01) == pytest.approx(1 / 4 + 2 * 10 * 0.01 / 2)
    assert p_value(2, 2, 2, math.log(3), 0.0) == pytest.approx(9 / 16)
    assert p_value(0, 5, 5, 1.0, 0.0) == pytest.approx(1.0)
    assert p_value(7, 9, 50, 0.3, 1.0) == 1.0
    # all right: 0.05 = (1 / (1 + e^-ε))^r
    odds = 0.05 ** (1 / 20)
    assert lower_bound(20, 20, 100, 0.0) == pytest.approx(math.log(odds / (1 - odds)), abs=2e-6)
    assert lower_bound(10, 20, 100, 0.0) == 0.0
    with pytest.raises(ConfigError, match="right=3, guesses=2"):
        p_value(3, 2, 10, 1.0, 0.0)


def test_bounds_are_those_that_the_paper_prints() -> None:
    assert lower_bound(75, 100, 1000, 1e-4) == pytest.approx(0.673, abs=1e-3)  # appendix D
    assert lower_bound(1439, 1510, 100_000, 1e-5) == pytest.approx(2.675, abs=1e-3)  # section 7


def random_response(rng: np.random.Generator, epsilon: float) -> tuple[int, int, int]:
    """Every coin is told, right with probability 1/(1+e^-ε); all are guessed as told."""
    return int(rng.binomial(200, 1 / (1 + math.exp(-epsilon)))), 200, 200


def laplace(rng: np.random.Generator, epsilon: float) -> tuple[int, int, int]:
    """Every coin is told with Laplace noise of scale 1/ε; the tenth that tells most is guessed."""
    present = rng.integers(0, 2, 2000) == 1
    scores = torch.from_numpy(present + rng.laplace(0, 1 / epsilon, 2000))
    return _guess(scores, torch.from_numpy(present), 200), 200, 2000


@pytest.mark.parametrize("mechanism", [random_response, laplace])
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_the_bound_is_over_a_known_epsilon_in_at_most_one_of_twenty_runs(
    mechanism: Callable[..., tuple[int, int, int]], epsilon: float
) -> None:
    rng, runs, bounds = np.random.default_rng(5), 2000, dict[int, float]()
    over = 0
    for _ in range(runs):
        right, guesses, canaries = mechanism(rng, epsilon)
        if right not in bounds:
            bounds[right] = lower_bound(right, guesses, canaries, 0.0)
        over += bounds[right] > epsilon
    error = math.sqrt(0.05 * 0.95 / runs)
    assert 0.01 < over / runs < 0.05 + 3 * error  # and is no more careful than whole numbers make it


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-2), (1.0, 1e-3), (2.0, 1e-4)])
def test_p_values_cover_a_mechanism_that_now_and_then_tells_all(epsilon: float, delta: float) -> None:
    guesses, odds = 50, 1 / (1 + math.exp(-epsilon))
    chances = [math.comb(guesses, k) * odds**k * (1 - odds) ** (guesses - k) for k in range(guesses + 1)]
    for right in range(guesses + 1):
        truth = (1 - delta) * math.fsum(chances[right:]) + delta  # random response, or the coins as they are
        assert p_value(right, guesses, guesses, epsilon, delta) >= truth - 1e-12
