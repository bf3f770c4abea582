"""Which settings schedulers without a barrier exclude, in one line each, before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import pytest

import fedlora as fl
from fedlora.engines.in_process import InProcess
from fedlora.errors import ConfigError
from fedlora.rounds.aggregation.plain import PlainAggregation
from fedlora.rounds.scheduling import Synchronous
from fedlora.schedulers import Asynchronous, Buffered


@dataclass(frozen=True)
class Own(fl.strategies.FedIT):
    staleness = fl.Strategy.staleness


def refusal(**settings: Any) -> str:
    settings = {"scheduler": Buffered(buffer=2), "clients": 3, **settings}
    with pytest.raises(ConfigError) as refused:
        fl.simulate("tiny", "tiny", rounds=1, progress=False, **settings)
    return str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "fedms"}, "strategy FedMS wants all of a round at the same stage"),
        ({"strategy": "slora"}, "strategy SLoRA wants all of a round at the same stage"),
        ({"strategy": Own()}, "strategy Own wants all of a round at the same stage"),
        ({"secure_sum": True}, "secure_sum: masks cancel in the sum of all clients that agreed on them"),
        ({"record_updates": True}, "record_updates: fedlora replay aggregates the updates of a round anew"),
        ({"robust": fl.robust.Median()}, "robust: Median compares updates, and under Buffered"),
        ({"privacy": fl.privacy.ClientLevel(epsilon=8, clip=1)}, "scheduler: under client-level privacy"),
        ({"scheduler": Buffered(buffer=4)}, "scheduler.buffer: expected at most 3, the number of clients"),
        ({"min_updates": 3}, "min_updates: expected at most 2, the updates of a buffer"),
        ({"scheduler": Asynchronous(), "min_updates": 2}, "expected at most 1, the updates of a buffer"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(settings: Any, said: str) -> None:
    assert said in refusal(**settings)


def test_over_selection_in_one_process_wants_virtual_time() -> None:
    with pytest.raises(ConfigError, match=r"engine.over_select: in one process nobody is late"):
        InProcess(over_select=0.5)
    assert InProcess(over_select=0.5, speeds={"lognormal": 1}).over_select == 0.5


def test_only_schedulers_without_a_barrier_mix_versions() -> None:
    assert [cls.mixes_versions for cls in (Synchronous, Buffered, Asynchronous)] == [False, True, True]
    plain = PlainAggregation()
    assert Synchronous().aggregation(plain) is plain
    assert Buffered().aggregation(plain).plain is plain
