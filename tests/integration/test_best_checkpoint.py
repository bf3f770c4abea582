"""The best round's state is the result: by validation rows alone, and whatever kills the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedlora as fl
from fedlora.callbacks import BestCheckpoint
from fedlora.cli.main import main
from fedlora.errors import CheckpointError, ConfigError
from fedlora.saved_runs.export import export, verify
from fedlora.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow  # whole runs

# FedIT's cross-covariance grows with the factors, so that another round than the last has the smallest.
JOB = ("strategy=fedit", "rounds=4", "evaluate.rows=validation", "client.steps=6")
BEST = (*JOB, "keep=best", "keep.metric=aggregation_error")


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


@pytest.fixture(scope="module")
def best(run: Callable[..., Any]) -> Any:
    return run(*BEST)


def test_the_result_is_that_of_a_run_which_ends_with_the_best_round(
    best: Any, run: Callable[..., Any]
) -> None:
    errors = {line["round"]: line["aggregation_error"] for line in best.metrics}
    selected = min(errors, key=errors.__getitem__)
    assert selected < 4, errors
    assert best.summary["selected_round"] == selected
    assert best.summary["rounds"] == 4
    short = run(*JOB, f"rounds={selected}")
    assert best.sha == short.sha != run(*JOB).sha
    for name in ("accuracy", "loss", "aggregation_error"):
        assert best.summary[name] == short.summary[name]


def test_verify_export_and_python_read_the_selected_state(best: Any, tmp_path: Path) -> None:
    assert verify(best.path).startswith("ok")
    export(best.path, tmp_path / "adapter", merged=False)
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (best.path / "adapter" / name).read_bytes()
    assert fl.open(best.path).state.round == best.summary["selected_round"]


INSTANTS = {
    "before the best state is kept": ("save_selected", 1, True),
    "after the best state was kept": ("save_selected", 1, False),
    "before a better state is kept": ("save_selected", 2, True),
    "before the round is recorded": ("finish_round", 2, True),
    "in a later round": ("finish_round", 4, True),
    "before the summary": ("write_json", 1, True),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_run_killed_at_any_instant_selects_the_same_state(
    instant: str, best: Any, run: Callable[..., Any], result: Any, tmp_path: Path
) -> None:
    call, number, before = INSTANTS[instant]
    out, calls, real = tmp_path / "run", [0], getattr(RunFolder, call)

    def dying(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and before:
            raise Killed
        made = real(*args)
        if calls[0] == number:
            raise Killed
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, call, dying)
        with pytest.raises(Killed):
            run(*BEST, out=out)
    main(["run", f"resume={out}"])
    got = result(out)
    assert got.sha == best.sha
    assert got.summary["selected_round"] == best.summary["selected_round"]


def test_a_state_that_was_not_kept_cannot_be_selected(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(*BEST, out=out)
    for file in (out / "checkpoint").glob("selected-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="lacks the state of round"):
        verify(out)
    with pytest.raises(CheckpointError, match="was not kept"):
        fl.open(out).resume(rounds=5, progress=False)


def test_it_is_refused_in_one_line_where_it_would_select_on_test_rows_or_no_whole_model(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"^keep: BestCheckpoint selects .*evaluate.rows=validation"
    ) as said:
        run("keep=best", out=out)
    assert "\n" not in str(said.value)
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"^keep: .*FedMS keeps a part of its model.*keep=last"):
        run("keep=best", "evaluate.rows=validation", "strategy=fedms", out=out)
    with pytest.raises(ConfigError, match=r"^evaluate.every: BestCheckpoint"):
        run("keep=best", "evaluate.rows=validation", "evaluate.every=0", out=out)


def test_a_callback_of_one_s_own_cannot_select_on_test_rows_either() -> None:
    class Mine(fl.callbacks.Callback):
        def on_round_end(self, run: Any, metrics: Any) -> None:
            run.select(run.done, run.state)

    with pytest.raises(ConfigError, match=r"evaluate=\{'rows': 'validation'\}"):
        fl.simulate("tiny", "tiny", clients=3, rounds=1, progress=False, callbacks=[Mine()])


def test_from_python_without_a_folder_it_is_the_same(best: Any) -> None:
    run = fl.simulate(
        "tiny",
        "tiny",
        clients=3,
        rounds=3,
        evaluate=fl.EvaluationSpec(rows="validation"),
        callbacks=[BestCheckpoint("aggregation_error")],
        progress=False,
    )
    errors = [line["aggregation_error"] for line in run.metrics]
    assert run.summary["selected_round"] == 1 + errors.index(min(errors))
    assert run.state.round == run.summary["selected_round"]
    assert run.config["keep"]["metric"] == "aggregation_error"
