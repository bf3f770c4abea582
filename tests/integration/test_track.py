import csv
from collections.abc import Callable
from typing import Any

import pytest

import fedlora.config.translate as translate
from fedlora.callbacks.csv import CSV
from fedlora.config.composition import compose
from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs


class Full(CSV):
    """A disk that is full from the start."""

    def begin(self, *arguments: Any) -> None:
        raise OSError("No space left on device")


def test_a_tracked_run_is_the_same_run_with_its_numbers_beside_it(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run()
    kept = run("track=csv", "track.clients=true")
    with (kept.path / "tracking" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in kept.metrics]
    assert {"client/0/loss", "client/2/loss"} <= set(rows[0])
    monkeypatch.setitem(translate.TRACKERS, "csv", Full)
    capsys.readouterr()
    broken = run("track=csv")
    assert capsys.readouterr().out.count("No space left") == 1
    assert plain.sha == kept.sha == broken.sha
    assert not (plain.path / "tracking").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["track.name=nope"], ["nope", "csv"]),
        (["track=wandb", "track.mode=on"], ["track.mode", "offline"]),
        (["+track.projekt=x", "track=mlflow"], ["projekt"]),
    ],
)
def test_a_wrong_tracker_is_one_line(words: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        translate.run_spec(compose(words))
    assert all(word in str(caught.value) for word in named)
