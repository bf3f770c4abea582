from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from fedlora.callbacks.console import Progress, megabytes


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
    with Progress(rounds, 0, metric, console) as progress:
        for round in range(1, rounds + 1):
            progress.begin(round, 4)
            progress.advance(4)
            progress.end(line(round, **more))
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
    with Progress(1, 0, "accuracy", Console(file=file, width=160)) as progress:
        progress.warn("wrong tensors: missing ['a[/b].A'] [red]x")
    assert "missing ['a[/b].A'] [red]x" in file.getvalue()


def test_a_failure_closes_the_live_display() -> None:
    console = Console(file=StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError), Progress(1, 0, "accuracy", console):
        raise RuntimeError
    with Progress(1, 0, "accuracy", console):  # rich allows one live display at a time
        pass


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 MB"), (12_345, "0.01 MB"), (9.99e6, "9.99 MB"), (123.4e6, "123.4 MB")]
)
def test_megabytes(count: float, text: str) -> None:
    assert megabytes(count) == text
