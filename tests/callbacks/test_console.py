from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from fedlora.callbacks.base import Callbacks, RunHandle
from fedlora.callbacks.console import ConsoleProgress, megabytes


def line(round: int, **more: Any) -> dict[str, Any]:
    known = {
        "loss": 0.5,
        "accuracy": 0.75,
        "train_loss": None,
        "bytes_down": 2_500_000,
        "bytes_up": 1_250_000,
    }
    return {"round": round, **known, "clients": 3, "dropped": 1, "seconds": 61.0, **more}


def shown(terminal: bool, rounds: int = 3, metric: str = "accuracy", **more: Any) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, _environ={})
    callbacks = Callbacks(RunHandle(rounds, metric=metric, callbacks=[ConsoleProgress(console)]))
    callbacks.run_begin()
    for round in range(1, rounds + 1):
        callbacks.round_begin(round, 4)
        callbacks.client_done(4)
        callbacks.round_end(line(round, **more))
    callbacks.run_end({})
    return file.getvalue()


def test_not_a_terminal_gets_one_line_a_round() -> None:
    text = shown(terminal=False)
    assert text.splitlines()[0] == (
        "round 1/3  loss 0.500  accuracy 0.750  train loss -  down 2.50 MB  up 1.25 MB  "
        "clients 3  dropped 1  seconds 61.0  left 2:02"
    )
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text
    assert "left 0:00" in text.splitlines()[-1]


def test_a_terminal_gets_a_live_table() -> None:
    text = shown(terminal=True)
    for word in ("round", "loss", "accuracy", "down", "up", "clients", "left", "2.50 MB", "1.25 MB", "2:02"):
        assert word in text
    assert "\x1b" in text


def test_the_tasks_own_metric_heads_its_column() -> None:
    text = shown(terminal=False, metric="perplexity", perplexity=12.5)
    assert "perplexity 12.500" in text
    assert "accuracy" not in text


def test_a_round_that_was_not_evaluated_shows_a_dash() -> None:
    assert "loss -  accuracy -" in shown(terminal=False, loss=None, accuracy=None)


def test_a_warning_prints_brackets_as_they_are() -> None:
    file = StringIO()
    run = RunHandle(1, callbacks=[ConsoleProgress(Console(file=file, width=160))])
    run.warn("wrong tensors: missing ['a[/b].A'] [red]x")  # before the run has begun, too
    assert "missing ['a[/b].A'] [red]x" in file.getvalue()


def test_the_end_of_a_run_closes_the_live_display_and_the_next_run_can_open_it() -> None:
    console = Console(file=StringIO(), force_terminal=True)
    progress = ConsoleProgress(console)
    for _ in range(2):  # rich allows one live display at a time
        callbacks = Callbacks(RunHandle(1, callbacks=[progress]))
        callbacks.run_begin()
        callbacks.run_end({})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 MB"), (12_345, "0.01 MB"), (9.99e6, "9.99 MB"), (123.4e6, "123.4 MB")]
)
def test_megabytes(count: float, text: str) -> None:
    assert megabytes(count) == text
