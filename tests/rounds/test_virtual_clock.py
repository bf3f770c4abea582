"""Virtual time: speeds and absences by seed or from a trace, and what a synchronous round takes."""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import CheckpointError, ConfigError
from fedlora.rounds.speeds import Speeds
from fedlora.rounds.virtual_clock import VirtualClock
from fedlora.strategies import FedIT


def traced(tmp_path: Path, text: str) -> Speeds:
    (tmp_path / "trace.csv").write_text(text)
    return Speeds.of(tmp_path / "trace.csv")


def test_speeds_are_the_seed_s_and_spread_as_was_asked() -> None:
    speeds = Speeds(seconds=2.0, lognormal=0.5)
    own = [speeds.pace(client, 1).seconds for client in range(400)]
    assert own == [Speeds(seconds=2.0, lognormal=0.5).pace(client, 1).seconds for client in range(400)]
    assert own != [speeds.pace(client, 2).seconds for client in range(400)]
    assert statistics.median(own) == pytest.approx(2.0, rel=0.15)
    assert {Speeds(seconds=3).pace(client, 1).seconds for client in range(9)} == {3.0}


def test_a_client_is_away_for_its_share_of_the_periods() -> None:
    pace = Speeds(absent=0.25, period=10).pace(3, 0)
    away = [pace.back(10.0 * at + 5) > 10 * at + 5 for at in range(800)]
    assert statistics.fmean(away) == pytest.approx(0.25, abs=0.05)
    begun = next(at for at, gone in enumerate(away) if gone)
    assert pace.back(10.0 * begun + 5) % 10 == 0  # it is back at the beginning of a period


def test_a_trace_has_each_client_s_seconds_and_absences(tmp_path: Path) -> None:
    speeds = traced(tmp_path, "client,seconds,absent_from,absent_until\n0,2,,\n1,0.5,3,7\n1,,10,12\n")
    clock = VirtualClock(speeds, 0, steps=lambda client: 4)
    assert [clock.finish(0), clock.finish(1)] == [8.0, 2.0]
    clock.now = 2.0
    assert clock.finish(1) == 7.0  # done at 4, and away until 7
    clock.now = 9.0
    assert clock.finish(1) == 12.0
    clock.now = 11.0
    assert (clock.free(0), clock.free(1)) == (11.0, 12.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client\n0\n", "needs the columns client, seconds"),
        ("client,seconds,color\n0,1,red\n", "got color"),
        ("client,seconds\n0,fast\n", "line 2"),
        ("client,seconds\n0,1\n1,0\n", "line 3"),
        ("client,seconds,absent_from,absent_until\n0,1,5,2\n", "line 2"),
        ("client,seconds,absent_from,absent_until\n0,1,5,\n", "line 2"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        traced(tmp_path, text)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("nowhere.csv", "cannot read 'nowhere.csv'"),
        ({"sigma": 1}, "got 'sigma'"),
        (3, "expected a CSV file, or some of seconds, lognormal"),
        ({"absent": 1}, "engine.speeds.absent"),
        ({"seconds": 0}, "engine.speeds.seconds"),
        ({"per": "day"}, "engine.speeds.per"),
    ],
)
def test_speeds_that_cannot_be_are_refused(setting: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Speeds.of(setting)


def test_a_client_that_a_trace_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row of client 1"):
        traced(tmp_path, "client,seconds\n0,1\n").pace(1, 0)


def test_a_synchronous_round_takes_as_long_as_its_slowest_client(lab: Any, tmp_path: Path) -> None:
    speeds = traced(tmp_path, "client,seconds\n0,1\n1,5\n2,2\n")
    want, began = lab.run(FedIT(), rounds=3), time.perf_counter()
    ran = lab.run(FedIT(), rounds=3, clock=VirtualClock(speeds, 0, steps=lambda client: 1000))
    assert [line["virtual_seconds"] for line in ran.lines("metrics.jsonl")] == [5000, 10000, 15000]
    assert ran.digest == want.digest  # time changes nothing of what is learned
    assert time.perf_counter() - began < 60


def test_with_over_selection_it_takes_as_long_as_those_it_waits_for(lab: Any, tmp_path: Path) -> None:
    speeds = traced(tmp_path, "client,seconds\n0,1\n1,5\n2,2\n3,9\n")
    ran = lab.run(
        FedIT(),
        (4,) * 4,
        rounds=3,
        clients_per_round=2,
        over_select=1.0,
        clock=VirtualClock(speeds, 0, enough=lambda clients: 2),
    )
    # The two fast ones, while the slow ones work on what nobody waits for; then whoever is free.
    assert [line["virtual_seconds"] for line in ran.lines("metrics.jsonl")] == [2, 4, 6]
    status = {(line["round"], line["client"]): line["status"] for line in ran.lines("clients.jsonl")}
    dropped = {(1, 1): "dropped", (1, 3): "dropped"}
    assert status == dropped | {(number, client): "ok" for number in (1, 2, 3) for client in (0, 2)}
    assert {client for group in ran.client.groups for client in group} == {0, 2}


def test_a_clock_goes_on_from_its_checkpoint() -> None:
    clock = VirtualClock(Speeds(lognormal=1.0), 5, enough=lambda clients: 2)
    clock.late(range(5))
    other = VirtualClock(Speeds(lognormal=1.0), 5, enough=lambda clients: 2)
    other.load(clock.dump())
    assert [other.free(client) for client in range(5)] == [clock.free(client) for client in range(5)]
    assert other.now == clock.now > 0
    with pytest.raises(CheckpointError, match="virtual time"):
        other.load("[]")


@pytest.mark.parametrize("period", [0.1, 0.7, 33.3])
def test_a_client_comes_back_in_whole_periods_however_these_are_rounded(period: float) -> None:
    pace = Speeds(absent=0.5, period=period).pace(3, 0)
    for number in range(120):
        back = pace.back(number * period)
        assert back >= number * period
        assert pace.back(back) == back
