"""A callback of the user's own, in a file outside the package: what it is told, and what it may ask for."""

import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora.callbacks.base import Callbacks

pytestmark = pytest.mark.slow  # whole runs

OWN = '''
"""Writes down all that it is told, and stops the run once the loss is below a bound."""

from fedlora.callbacks import Callback


class Bound(Callback):
    def __init__(self, loss=0.0, broken=False):
        self.loss, self.broken, self.calls = loss, broken, []

    def on_run_begin(self, run):
        self.calls.append(("run", run.rounds, run.done, len(run.metrics), run.config["seed"]))

    def on_round_begin(self, run, round, clients):
        self.calls.append(("round", round, clients))

    def on_client_done(self, run, count):
        self.calls.append(("clients", count))

    def on_round_end(self, run, metrics):
        if self.broken:
            1 / 0
        self.calls.append(("ended", metrics["round"], run.done, run.state.round, len(run.clients)))
        if metrics["loss"] < self.loss:
            run.stop(f"the loss is below {self.loss}")

    def on_run_end(self, run, summary):
        self.calls.append(("end", summary.get("rounds")))
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "own_callback.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_callback")
    del sys.modules["own_callback"]


def small(**more: Any) -> fl.Run:
    return fl.simulate("tiny", "tiny", **{"clients": 3, "rounds": 2, "progress": False} | more)


def test_it_is_told_of_everything_in_order(own: Any, tmp_path: Path) -> None:
    seen = own.Bound()
    run = small(callbacks=[seen], seed=4, out=tmp_path / "run")
    assert seen.calls[0] == ("run", 2, 0, 0, 4)
    assert [call for call in seen.calls if call[0] != "clients"][1:] == [
        ("round", 1, 3),
        ("ended", 1, 1, 1, 3),
        ("round", 2, 3),
        ("ended", 2, 2, 2, 3),
        ("end", 2),
    ]
    assert sum(call[1] for call in seen.calls if call[0] == "clients") == 6
    assert "stopped" not in run.summary
    again = own.Bound()
    run.resume(rounds=3, progress=False, callbacks=[again])
    assert again.calls[0] == ("run", 3, 2, 2, 4)
    assert again.calls[-1] == ("end", 3)


def test_it_can_stop_the_run_which_then_is_one_of_fewer_rounds(own: Any) -> None:
    stopped = small(rounds=6, callbacks=[own.Bound(loss=99.0)])
    assert stopped.summary["stopped"] == "the loss is below 99.0"
    assert stopped.summary["rounds"] == len(stopped.metrics) == 1
    short = small(rounds=1)
    assert stopped.summary["adapter_sha256"] == short.summary["adapter_sha256"]
    assert stopped.summary["accuracy"] == short.summary["accuracy"]


def test_the_result_of_a_run_that_stopped_at_a_round_without_evaluation_is_evaluated(own: Any) -> None:
    class Second(fl.callbacks.Callback):
        def on_round_end(self, run: Any, metrics: Any) -> None:
            if run.done == 2:
                run.stop("enough")

    stopped = small(rounds=6, callbacks=[Second()], evaluate={"every": 3})
    assert "loss" not in stopped.metrics[-1]
    assert stopped.summary["loss"] == small(rounds=2).summary["loss"]


def test_its_error_ends_the_run_with_its_own_traceback_and_all_are_told(own: Any) -> None:
    broken, other = own.Bound(broken=True), own.Bound()
    with pytest.raises(ZeroDivisionError) as caught:
        small(callbacks=[other, broken])
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert Path(frames[-1].filename).name == "own_callback.py"
    assert other.calls[-1] == broken.calls[-1] == ("end", None)


def test_who_leaves_a_session_early_has_a_run_that_was_cut_off(own: Any) -> None:
    seen = own.Bound()
    session = fl.Session("tiny", "tiny", clients=3, rounds=3, callbacks=[seen])
    assert next(session)["round"] == 1
    session.close()
    assert seen.calls[-1] == ("end", None)


def test_all_are_told_of_the_end_and_then_the_first_error_comes(own: Any) -> None:
    class Broken(fl.callbacks.Callback):
        def on_run_end(self, run: Any, summary: Any) -> None:
            raise OSError("the disk is full")

    last = own.Bound()
    with pytest.raises(OSError, match="disk is full"):
        Callbacks(fl.callbacks.RunHandle(1, callbacks=[Broken(), last])).run_end({})
    assert last.calls == [("end", None)]


def test_its_warnings_reach_every_callback() -> None:
    class Heard(fl.callbacks.Callback):
        def __init__(self) -> None:
            self.heard = list[str]()

        def on_warning(self, run: Any, text: str) -> None:
            self.heard.append(text)

    class Odd(fl.callbacks.Callback):
        def on_round_end(self, run: Any, metrics: Any) -> None:
            run.warn("odd")

    heard = Heard()
    small(rounds=1, callbacks=[heard, Odd()])
    assert "odd" in heard.heard
