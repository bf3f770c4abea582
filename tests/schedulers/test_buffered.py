"""Rounds without a barrier: what an old update does, and how a run goes on that was killed."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import strategies
from fedlora.callbacks.base import Callbacks
from fedlora.core.strategy import Strategy
from fedlora.rounds.speeds import Speeds
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.schedulers import Asynchronous, Buffered
from fedlora.storage.client_state import ClientStore

MIXED, ALIKE = (4, 2, 3, 1, 4, 2), (4,) * 6
EVERY = [getattr(strategies, name)() for name in strategies.__all__]
TAKE_OLD = [one for one in EVERY if one.staleness != "refused"]
every_strategy = pytest.mark.parametrize("strategy", TAKE_OLD, ids=lambda one: type(one).__name__)


def clock(**speeds: Any) -> VirtualClock:
    return VirtualClock(Speeds(**speeds), seed=3)


@pytest.fixture
def prepare(lab: Any, tmp_path: Path) -> Any:
    """A run of a strategy, of mixed ranks where it takes them; what clients keep is in a named folder."""

    def made(strategy: Strategy, name: str, **more: Any) -> Any:
        ranks = MIXED if strategy.mixed_ranks else ALIKE
        ran = lab.prepare(strategy, ranks, site={"memory": ClientStore(tmp_path / name)}, **more)
        Callbacks(ran.handle).run_begin()
        return ran

    return made


@pytest.fixture
def run(prepare: Any) -> Any:
    def whole(*args: Any, **more: Any) -> Any:
        ran = prepare(*args, **more)
        ran.federation.run(ran.grid)
        return ran

    return whole


@every_strategy
def test_a_buffer_of_all_is_the_synchronous_run_bit_for_bit(run: Any, strategy: Strategy) -> None:
    want = run(strategy, "one", rounds=3)
    got = run(strategy, "other", rounds=3, scheduler=Buffered(buffer=6), clock=clock(lognormal=1.0))
    assert got.federation.state.digest() == want.federation.state.digest()
    assert [line["staleness"] for line in got.lines("metrics.jsonl")] == [0, 0, 0]


def test_so_it_is_where_replies_are_taken_as_they_come(run: Any) -> None:
    want = run(strategies.FlexLoRA(), "one", rounds=3)
    got = run(strategies.FlexLoRA(), "other", rounds=3, scheduler=Buffered(buffer=6))
    assert got.digest == want.digest


@every_strategy
def test_clients_that_learn_nothing_move_nothing_whatever_their_rank_and_age(
    run: Any, noise: Any, strategy: Strategy
) -> None:
    """After two rounds of learning nobody learns; tasks of the learning rounds are still out then."""
    asynchronous = {"scheduler": Buffered(buffer=2)}
    moved = run(strategy, "one", rounds=2, clock=clock(lognormal=1.0), **asynchronous)
    learnt = moved.federation.state
    ran = run(
        strategy,
        "one",
        rounds=7,
        client=noise(still=True),
        clock=clock(lognormal=1.0),
        resumed=moved.folder,
        **asynchronous,
    )
    ages = [line["staleness"] for line in ran.lines("clients.jsonl") if line["round"] > 2]
    assert len(ages) == 10
    assert max(ages) > 1
    still = ran.federation.state
    assert still.round == 7
    for module in learnt.adapter.pairs:
        assert torch.equal(still.delta(module), learnt.delta(module))
    for name, tensor in learnt.adapter.extra.items():
        assert torch.equal(still.adapter.extra[name], tensor)


@pytest.mark.parametrize(
    "scheduler", [Buffered(buffer=2, concurrency=5), Asynchronous(concurrency=3)], ids=["buffered", "each"]
)
@pytest.mark.parametrize(
    "strategy",
    [strategies.FLoRA(), strategies.FedSALoRA()],
    ids=lambda s: type(s).__name__,
)
def test_a_run_that_was_killed_with_tasks_out_ends_with_the_same_hash(
    run: Any, prepare: Any, strategy: Strategy, scheduler: Any
) -> None:
    settings: dict[str, Any] = {"rounds": 7, "scheduler": scheduler}
    speeds = {"lognormal": 1.5, "absent": 0.2, "period": 1.0}
    want = run(strategy, "one", clock=clock(**speeds), **settings)
    killed = prepare(strategy, "other", clock=clock(**speeds), **settings)
    for _ in itertools.islice(killed.federation.rounds(killed.grid), 3):
        pass
    again = run(strategy, "other", clock=clock(**speeds), resumed=killed.folder, **settings)
    assert again.federation.state.digest() == want.federation.state.digest()
    both = [[line["virtual_seconds"] for line in ran.lines("metrics.jsonl")] for ran in (want, again)]
    assert both[0] == both[1]
    assert max(line["staleness"] for line in want.lines("clients.jsonl")) > 1
