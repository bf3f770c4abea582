"""When a run stops early, by lists of scores and by whole runs."""

from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora.callbacks import Callback, EarlyStopping, RunHandle
from fedlora.callbacks.base import Callbacks
from fedlora.callbacks.scores import scores
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs


def stopped_after(rule: EarlyStopping, lines: list[dict[str, Any]]) -> int | None:
    """The round after which a run with these lines is stopped."""
    run = RunHandle(99, validation=True, callbacks=[rule])
    callbacks = Callbacks(run)
    callbacks.run_begin()
    for number, line in enumerate(lines, 1):
        callbacks.round_end({"round": number, **line})
        if run.stopped:
            return number
    return None


def accuracies(*values: float | None) -> list[dict[str, Any]]:
    return [{} if value is None else {"loss": 1.0, "accuracy": value} for value in values]


@pytest.mark.parametrize(
    ("rule", "lines", "wanted"),
    [
        (EarlyStopping(2), accuracies(0.1, 0.2, 0.2, 0.2, 0.9), 4),
        (EarlyStopping(2), accuracies(0.1, 0.2, 0.2, 0.3, 0.3), None),
        (EarlyStopping(3), accuracies(0.5, 0.4, 0.3, 0.2, 0.1), 4),
        (EarlyStopping(2), accuracies(0.5, 0.3, 0.4), 3),  # better than the last, and not than the best
        (EarlyStopping(1, "mse"), [{"loss": 0, "mse": x} for x in (3.0, 2.0, 2.5)], 3),
        (EarlyStopping(2, least_change=0.05), accuracies(0.50, 0.54, 0.55, 0.9), 3),
        (EarlyStopping(2), accuracies(0.5, None, 0.4, None, None, 0.3), 6),
        (EarlyStopping(1), accuracies(float("nan"), 0.1, float("nan")), 3),
        (EarlyStopping(1, "loss"), [{"loss": 3.0}, {"loss": 2.0}, {"loss": 2.5}], 3),
        (EarlyStopping(1, "perplexity"), [{"loss": 0, "perplexity": p} for p in (9.0, 8.0, 7.0)], None),
        (EarlyStopping(1, "train_loss"), [{"train_loss": x} for x in (3.0, None)], 2),
    ],
)
def test_it_stops_after_so_many_evaluated_rounds_without_improvement(
    rule: EarlyStopping, lines: list[dict[str, Any]], wanted: int | None
) -> None:
    assert stopped_after(rule, lines) == wanted


@pytest.mark.parametrize("more", [True, False])
def test_the_headline_metric_is_better_as_its_task_says_whatever_its_name(more: bool) -> None:
    lines = [{"round": k, "loss": 1.0, "distance": x} for k, x in enumerate((3.0, 2.0, 2.5), 1)]
    run = RunHandle(
        9, done=3, metrics=lines, validation=True, metric="distance", more_is_better=more, callbacks=[]
    )
    assert [score for _, score in scores(run)] == [x if more else -x for x in (3.0, 2.0, 2.5)]


def test_a_resumed_run_knows_what_went_before_and_may_stop_at_once() -> None:
    lines = [{"round": k, **line} for k, line in enumerate(accuracies(0.5, 0.4, 0.3), 1)]
    for known, reason in ((2, False), (3, True)):
        run = RunHandle(9, done=known, metrics=lines[:known], validation=True, callbacks=[EarlyStopping(2)])
        Callbacks(run).run_begin()
        assert bool(run.stopped) is reason


def test_a_metric_that_no_round_has_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^metric: expected one of accuracy, loss, got 'f1'$"):
        stopped_after(EarlyStopping(1, "f1"), accuracies(0.1))


@pytest.mark.parametrize("words", [{"patience": 0}, {"patience": 1.5}, {"patience": 1, "least_change": -1.0}])
def test_settings_that_cannot_be_are_refused_by_name(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^stop\.(patience|least_change): expected"):
        EarlyStopping(**words)


class Heard(Callback):
    def __init__(self) -> None:
        self.heard = list[str]()

    def on_warning(self, run: RunHandle, text: str) -> None:
        self.heard.append(text)


@pytest.mark.parametrize("rows", ["test", "validation"])
def test_a_run_stops_says_why_and_warns_of_test_rows(rows: str, tmp_path: Path) -> None:
    heard, rule = Heard(), EarlyStopping(1, least_change=1.0)  # no accuracy can improve by more than 1
    run = fl.simulate(
        "tiny",
        "tiny",
        clients=3,
        rounds=5,
        progress=False,
        evaluate={"rows": rows},
        callbacks=[heard, rule],
        out=tmp_path / "run",
    )
    assert (len(run.metrics), run.summary["rounds"]) == (2, 2)
    assert run.summary["stopped"] == "accuracy has not improved in 1 evaluated rounds"
    assert any("by the test rows" in text for text in heard.heard) is (rows == "test")
    assert run.config["stop"] == {
        "_target_": "fedlora.callbacks.early_stopping.EarlyStopping",
        "patience": 1,
        "metric": None,
        "least_change": 1.0,
    }


STOPS = {"clients": 3, "rounds": 5, "evaluate": {"rows": "validation"}}


def stopped_early(out: Path) -> fl.Run:
    """A run that stops after its second round."""
    stop = EarlyStopping(1, least_change=1.0)
    return fl.simulate("tiny", "tiny", **STOPS, callbacks=[stop], out=out, progress=False)


def test_a_resumed_run_that_stopped_early_says_so_in_one_line_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped_early(tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    capsys.readouterr()
    again = fl.open(run.path).resume(rounds=9)
    said = capsys.readouterr().out.strip()
    assert "stopped early after round 2, since accuracy has not improved in 1 evaluated rounds" in said
    assert "\n" not in said
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before
    assert again.summary == run.summary


def test_one_killed_between_its_stop_and_its_summary_announces_no_rounds_and_ends_as_it_would_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped_early(tmp_path / "run")
    was = run.summary
    (run.path / "summary.json").unlink()
    capsys.readouterr()
    again = fl.open(run.path).resume()
    said = capsys.readouterr().out
    assert "stopped after round 2, since accuracy has not improved" in said
    assert "rounds 3 to 5" not in said
    assert [again.summary[key] for key in ("stopped", "rounds", "adapter_sha256")] == [
        was[key] for key in ("stopped", "rounds", "adapter_sha256")
    ]


class Impatient(Callback):
    """Stops by what only it knows."""

    def on_round_end(self, run: RunHandle, metrics: Any) -> None:
        run.stop("enough")


def test_a_run_that_an_own_callback_stopped_goes_on_without_it(tmp_path: Path) -> None:
    run = fl.simulate(
        "tiny",
        "tiny",
        **STOPS,
        callbacks=[Impatient(), EarlyStopping(9)],
        out=tmp_path / "run",
        progress=False,
    )
    assert run.summary["rounds"] == 1
    assert fl.open(run.path).resume(progress=False).summary["rounds"] == 5


def test_the_command_line_has_it_and_refuses_it_where_no_round_is_evaluated() -> None:
    words = ["model=tiny", "data=tiny", "stop=early", "stop.patience=7"]
    assert run_spec(compose(words)).callbacks == (EarlyStopping(7),)
    with pytest.raises(ConfigError, match=r"evaluate.every: EarlyStopping decide"):
        fl.simulate("tiny", "tiny", evaluate={"every": 0}, callbacks=[EarlyStopping(1)], progress=False)
