"""What a site has promised to runs, and what it refuses to promise."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from fedlora.deploy.limits import Limits, Promise
from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import DPSGD


def plan(epsilon: float = 1.0, delta: float | None = None, n: int = 200, **more: Any) -> Any:
    return DPSGD(epsilon, delta, accountant="rdp", participations=1, **more).plan(n, 10, 5)


def test_promises_to_runs_that_begin_at_once_are_within_the_budget(tmp_path: Path) -> None:
    asked, barrier = plan(1.0), Barrier(8)

    def promise(name: str) -> bool:
        barrier.wait()
        try:
            Limits(tmp_path, 3.0).promise(name, asked, 200)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(promise, "abcdefgh"))
    assert sum(kept) == 3 == len(Limits(tmp_path, 3.0).promised())


def test_promises_add_up_over_runs_in_epsilon_and_in_delta(tmp_path: Path) -> None:
    limits = Limits(tmp_path, 5.0, delta=3e-3)
    limits.promise("one", plan(1.0, 2e-3), 200)
    limits.promise("one", plan(1.0, 1e-3), 200)  # the same run: the larger of both
    limits.promise("two", plan(1.0, 2e-3), 200)
    assert limits.promised() == {"one": Promise(1.0, 2e-3, 0), "two": Promise(1.0, 2e-3, 0)}
    with pytest.raises(ConfigError, match="so much delta to other runs"):
        limits.promise("three", plan(1.0, 1.1e-3), 200)
    with pytest.raises(ConfigError, match=r"2 are promised to others, this one asks 3\.1"):
        limits.promise("three", plan(3.1), 200)
    limits.promise("three", plan(3.0), 200)
    assert Limits(tmp_path, 5.0).promised()["three"] == Promise(3.0, 1e-5, 0)


def test_a_run_is_not_promised_its_epsilon_twice_under_two_numbers_of_the_site(tmp_path: Path) -> None:
    """A ledger is kept under the client's number: under another one it would begin at nothing."""
    first, renumbered = (Limits(tmp_path, 5.0, client=number) for number in (0, 1))
    first.promise("one", plan(1.0), 200)
    for ask in (renumbered.check, renumbered.promise):
        with pytest.raises(ConfigError, match="is of client 0; give every site a state folder"):
            ask("one", plan(1.0), 200)
    renumbered.promise("two", plan(1.0), 200)
    first.promise("one", plan(1.0), 200)
    assert first.promised() == {"one": Promise(1.0, 1e-5, 0), "two": Promise(1.0, 1e-5, 1)}


@pytest.mark.parametrize("n", [50, 20_000])
def test_a_site_that_says_no_delta_takes_what_a_run_takes_by_itself(tmp_path: Path, n: int) -> None:
    own = min(1e-5, 0.1 / n)
    Limits(tmp_path, 5.0).check("one", plan(n=n), n)
    Limits(tmp_path, 5.0).check("one", plan(delta=own, n=n), n)
    with pytest.raises(ConfigError, match="a delta of at most"):
        Limits(tmp_path, 5.0).check("one", plan(delta=own * 1.001, n=n), n)


def test_a_refusal_over_delta_tells_no_count(tmp_path: Path) -> None:
    hidden = plan(n=20_000, public_counts=False)  # a delta of 5e-6, which follows from the rows
    with pytest.raises(ConfigError) as caught:
        Limits(tmp_path, 5.0, delta=1e-6).check("one", hidden, 20_000)
    assert "5e-06" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        Limits(tmp_path, 5.0).check("one", plan(delta=6e-6, n=20_000, public_counts=False), 20_000)
    assert "5e-06" not in str(caught.value)


def test_promises_of_epsilon_alone_are_still_kept_and_damaged_ones_stop_a_site(tmp_path: Path) -> None:
    file = tmp_path / "promised.json"
    file.write_text('{"old": 3.0}')
    assert Limits(tmp_path, 5.0).promised() == {"old": Promise(3.0, 1e-5)}
    with pytest.raises(ConfigError, match="3 are promised"):
        Limits(tmp_path, 5.0).check("new", plan(2.1), 200)
    for text in ("", "[]", "{", '{"a": true}', '{"a": {"epsilon": 1}}', '{"a": {"epsilon": -1, "delta": 0}}'):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            Limits(tmp_path, 5.0).check("new", plan(1.0), 200)
