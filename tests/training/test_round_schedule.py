"""The rates and steps of rounds: those of torch's schedulers, and of the federation for every client."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import base_of
from torch.optim import lr_scheduler

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, fresh_adapter, targets
from fedlora.models.products import OneByOne
from fedlora.training.client import TrainRequest
from fedlora.training.round_schedule import RoundSchedule


def by_torch(own: RoundSchedule, rounds: int) -> list[float]:
    """The rate of each round over that of the client, by torch's own schedulers in float64."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    W, left = own.warmup, max(1, rounds - own.warmup)
    main: Any = {
        "constant": lambda: lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, own.floor, left),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, left, own.floor),
        "step": lambda: lr_scheduler.StepLR(optimizer, own.every, own.gamma),
    }[own.schedule]
    if W:
        first = lr_scheduler.LinearLR(optimizer, 1 / (W + 1), 1.0, W)
        scheduler: Any = lr_scheduler.SequentialLR(optimizer, [first, main()], [W])
    else:
        scheduler = main()
    found = []
    for _ in range(rounds):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR warns of its own way to step
            scheduler.step()
    return found


@given(
    st.sampled_from(["constant", "linear", "cosine", "step"]),
    st.integers(0, 4),
    st.floats(0, 1),
    st.integers(1, 3),
    st.floats(0.1, 1),
    st.integers(1, 9),
)
def test_every_round_has_the_rate_of_torch_s_schedulers(
    schedule: Any, warmup: int, floor: float, every: int, gamma: float, rounds: int
) -> None:
    own = RoundSchedule(schedule, warmup, floor, every, gamma)
    found = [own.factor(t, rounds) for t in range(1, rounds + 1)]
    assert found == pytest.approx(by_torch(own, rounds), abs=1e-12)
    assert all(0 < factor <= 1 for factor in found)


def test_the_number_of_rounds_decides_and_more_rounds_bend_the_rest_of_the_curve() -> None:
    own = RoundSchedule("linear")
    assert [own.factor(t, 4) for t in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    assert [own.factor(t, 8) for t in (5, 8)] == [0.5, 0.125]
    with pytest.raises(ConfigError, match=r"schedule=linear: goes over all rounds .* use constant or step"):
        own.factor(1)
    assert RoundSchedule("step", every=2).factor(5) == 0.25


def test_steps_hold_from_their_round_on() -> None:
    own = RoundSchedule(steps={"5": 10, 2: 20})  # type: ignore[dict-item]  # as a file has them
    assert [own.steps_of(t) for t in (1, 2, 4, 5, 99)] == [None, 20, 20, 10, 10]
    rows = [Example([1, 2], 0)] * 6
    client = LocalTraining(lr=0.1, batch_size=2, over_rounds=own)
    counted = [len(client.batches(TrainRequest(0, t, 0, Task(Adapter({})), rows))) for t in (1, 2, 5)]
    assert counted == [3, 20, 10]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "exponential"}, "expected constant, linear, cosine or step, got 'exponential'"),
        ({"warmup": -1}, "over_rounds.warmup: expected a whole number"),
        ({"floor": 2}, "over_rounds.floor: expected a share from 0 to 1"),
        ({"every": 0}, "over_rounds.every: expected a whole number of at least 1"),
        ({"gamma": 0}, "over_rounds.gamma: expected a number above 0"),
        ({"steps": [20]}, "expected steps by the round in which they begin"),
        ({"steps": {0: 5}}, "expected steps by the round in which they begin"),
        ({"steps": {1: 0}}, "steps of round 1: expected a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RoundSchedule(**settings)


@pytest.fixture(scope="module")
def base() -> Base:
    return base_of("Bert", torch.float32)


def request(base: Base, client: int, round: int) -> TrainRequest:
    shapes = targets(base, "query")
    task = Task(fresh_adapter(base, shapes, LoRA().peer(client, 2, shapes), base.heads, client))
    rows = [Example([5 + (3 * i + j) % 40 for j in range(4 + i % 3)], i % 2) for i in range(12)]
    return TrainRequest(client, round, 0, task, rows, rounds=4)


@pytest.mark.parametrize("way", [None, OneByOne()], ids=["apart", "in stacks, as on a GPU"])
def test_clients_of_one_pass_have_the_rates_of_their_own_rounds_beside_the_schedule_of_their_steps(
    base: Base, way: Any
) -> None:
    """Head and factors; what a client gets is what it gets alone at so much of the rates."""
    client = LocalTraining(lr=0.02, head_lr=0.01, batch_size=4, schedule="cosine", warmup=0.5)
    own = dataclasses.replace(client, over_rounds=RoundSchedule("linear"))
    asked = [request(base, 0, 1), request(base, 1, 3), request(base, 2, 4)]
    together = own.train(dataclasses.replace(base, products=way) if way else base, asked)
    for a, found, factor in zip(asked, together, (1.0, 0.5, 0.25), strict=True):
        slower = dataclasses.replace(client, lr=0.02 * factor, head_lr=0.01 * factor)
        [alone] = slower.train(base, [a])
        for (name, one), (_, other) in zip(found.adapter.tensors(), alone.adapter.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5, msg=name)
        assert found.metrics["lr"] == 0.02 * factor
        assert "lr" not in alone.metrics


def test_a_client_s_steps_on_a_loss_of_its_own_have_the_rate_that_they_are_given(base: Base) -> None:
    """As those of the clients of FedMS and pFedLoRA."""
    client = LocalTraining(lr=0.1, clip=None, optimizer=lambda groups: torch.optim.SGD(groups))
    ends = []
    for rate in (1.0, 0.25):
        weight = torch.nn.Parameter(torch.zeros(1))
        client.descend(
            base, {"A": [weight]}, lambda rows, w=weight: w.expand(len(rows)), [[Example([1], 0)]], rate
        )
        ends.append(float(weight.detach()))
    assert ends == pytest.approx([-0.1, -0.025])
