"""Clipped updates: the norm by plain numpy, and what secure sums gain by it."""

from typing import Any

import numpy as np
import pytest
import torch
from server_lab import Noise

import fedlora as fl
from fedlora.core.messages import Task
from fedlora.errors import ConfigError
from fedlora.robust import Clip
from fedlora.strategies import FedIT


def update(task: Task, adapter: fl.Adapter) -> fl.ClientUpdate:
    return fl.ClientUpdate(0, 1, 0, task, task.adapter, adapter, 10.0)


def norm(given: fl.ClientUpdate) -> float:
    start, now = dict(given.start.tensors()), dict(given.adapter.tensors())
    parts = [(now[n].double() - start[n].double()).numpy().ravel() for n in given.task.shared()]
    return float(np.linalg.norm(np.concatenate(parts)))


@pytest.mark.parametrize("share", [frozenset({"A", "B"}), frozenset({"B"})], ids=["A and B", "B alone"])
def test_a_long_change_gets_the_bound_and_its_direction_and_a_short_one_stays(lab: Any, share: Any) -> None:
    start = lab.adapter()
    far = start.with_tensors({n: t + torch.arange(t.numel()).view(t.shape) for n, t in start.tensors()})
    given = update(Task(start, train=share, share=share), far)
    made = Clip(0.25).on_client(given)
    assert norm(made) == pytest.approx(0.25, rel=1e-5)
    for name, by in made.change.items():
        torch.testing.assert_close(by, given.change[name] * (0.25 / norm(given)), atol=1e-6, rtol=1e-4)
    near = norm(given) * 1.001
    assert Clip(near).on_client(given) is given


def test_what_is_not_finite_is_left_for_whoever_receives_it_to_refuse(lab: Any) -> None:
    class Lost(Noise):
        def _moved(self, a: Any) -> fl.Adapter:
            found = super()._moved(a)
            bad = {"head.bias": torch.full((2,), float("nan"))}
            return found.with_tensors(bad) if a.client == 1 else found

    for secure in (False, True):
        ran = lab.run(
            FedIT(), (4,) * 4, rounds=1, client=Lost(), secure_sum=secure, site={"steps": [Clip(1.0)]}
        )
        assert [x["status"] for x in ran.lines("clients.jsonl")] == ["ok", "dropped", "ok", "ok"], secure


def test_a_client_that_goes_astray_moves_a_secure_sum_by_its_share_of_the_bound_at_most(lab: Any) -> None:
    class Astray(Noise):
        def _moved(self, a: Any) -> fl.Adapter:
            found = super()._moved(a)
            far = {name: tensor * 1e4 for name, tensor in found.tensors()}
            return found.with_tensors(far) if a.client == 2 else found

    def moved(**more: Any) -> float:
        honest, astray = (
            lab.run(FedIT(), (4,) * 4, rounds=1, client=c, secure_sum=True, weights="uniform", **more)
            for c in (Noise(), Astray())
        )
        both = (dict(ran.federation.state.adapter.tensors()) for ran in (honest, astray))
        one, other = both
        return float(sum((t - other[n]).double().square().sum() for n, t in one.items()) ** 0.5)

    assert moved() > 1e3
    assert moved(site={"steps": [Clip(2.0)]}) <= 2 * 2.0 / 4 + 1e-4


def test_a_rank_that_was_pruned_is_no_obstacle(lab: Any) -> None:
    start = lab.adapter(4)
    pruned = {m: fl.Pair(p.A[:3] + 1, p.B[:, :3] + 1, p.scale) for m, p in start.pairs.items()}
    given = update(Task(start), fl.Adapter(pruned, start.extra))
    made = Clip(0.5).on_client(given)
    assert made.adapter.pairs["a.q"].rank == 3
    assert float(sum(by.square().sum() for by in made.change.values())) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan")])
def test_a_bound_is_a_number_above_zero(bound: float) -> None:
    with pytest.raises(ConfigError, match=r"Clip\.bound: expected a number above 0"):
        Clip(bound)
