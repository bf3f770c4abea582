"""Server optimizers and schedules over rounds in whole runs: resumed, named in every way, and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import fedlora as fl
from fedlora.api.simulate import make_spec
from fedlora.cli.main import main
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError
from fedlora.runner import compatibility
from fedlora.runner.dealt import Dealt
from fedlora.storage.run_folder import RunFolder

JOB = ("strategy=flexlora", "ranks=[2,4]", "client.steps=3", "server=fedavgm", "server.rank=3")
JOB += ("client.over_rounds.schedule=step", "client.over_rounds.steps={2: 2}")


def test_a_run_that_goes_on_has_its_momentum_and_its_round_s_rate(
    run: Callable[..., Any], result: Any, tmp_path: Path
) -> None:
    """A schedule that does not ask for the number of rounds goes on as if it had never stopped."""
    whole = run(*JOB, "rounds=3")
    run(*JOB, "rounds=2", out=tmp_path / "run")
    main(["run", f"resume={tmp_path / 'run'}", "rounds=3"])
    again = result(tmp_path / "run")
    assert again.sha == whole.sha
    assert RunFolder(again.path).read_state()[1].digest() == RunFolder(whole.path).read_state()[1].digest()
    rates = {line["round"]: line["lr"] for line in again.clients}
    assert [rates[t] / rates[1] for t in (1, 2, 3)] == pytest.approx([1.0, 0.5, 0.25])
    assert [line["steps"] for line in again.clients if line["client"] == 0] == [3.0, 2.0, 2.0]
    assert 0 < again.metrics[-1]["momentum_kept"] < 1


def test_a_name_an_object_and_the_command_line_are_one(tmp_path: Path) -> None:
    named = make_spec("tiny", "tiny", {"server": "fedadam"})
    given = make_spec("tiny", "tiny", {"server": fl.server_optimizers.FedAdam()})
    composed = run_spec(compose(["model=tiny", "data=tiny", "server=fedadam"]))
    assert named.server == given.server == composed.server == fl.server_optimizers.FedAdam()
    config = OmegaConf.create(given.settings)
    assert run_spec(config).server == given.server  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"server: expected an object or one of fedadagrad, .*, got 'adam'"):
        make_spec("tiny", "tiny", {"server": "adam"})


def test_a_schedule_from_python_is_one_that_the_command_line_can_go_on_with() -> None:
    own = fl.RoundSchedule("cosine", warmup=2, steps={1: 20, 5: 10})
    client = fl.clients.LocalTraining(lr=0.1, over_rounds=own)
    config = OmegaConf.create(make_spec("tiny", "tiny", {"client": client}).settings)
    assert run_spec(config).client.over_rounds == own  # type: ignore[arg-type,attr-defined]


@pytest.mark.parametrize(
    ("strategy", "server", "said"),
    [
        ("hetlora", "fedavgm", "HetLoRA names no space .* server_space"),
        ("flexlora", "fedadam", "FedAdam steps every number .* use server=fedavgm, .* fedit"),
        ("fedsvd", "fedyogi", "FedYogi steps every number by itself, and FedSVD makes"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line_before_anything_is_loaded(
    strategy: str, server: str, said: str
) -> None:
    spec = make_spec("tiny", "tiny", {"strategy": strategy, "server": server})
    with pytest.raises(ConfigError, match=said) as raised:
        compatibility.check(compatibility.BEFORE_LOADING, spec)
    assert "\n" not in str(raised.value)


def test_a_space_that_there_is_not_is_named() -> None:
    class Odd(fl.strategies.FedIT):
        server_space = "factor"  # type: ignore[assignment]

    with pytest.raises(ConfigError, match=r"Odd.server_space to be one of factors, .*, got 'factor'"):
        make_spec("tiny", "tiny", {"strategy": Odd()})


def test_a_sum_of_padded_factors_gets_no_momentum() -> None:
    mixed = {"strategy": "ffalora", "server": "fedavgm", "secure_sum": True, "ranks": [2, 4, 4]}
    for words in (mixed, {**mixed, "ranks": 4}):
        spec = make_spec("tiny", "tiny", {**words, "clients": 3})
        ranks = [2, 4, 4] if words is mixed else [4, 4, 4]
        dealt = Dealt(spec, spec.data.source(), 3, ranks)
        if words is mixed:
            with pytest.raises(
                ConfigError, match=r"under secure_sum .* rank instead of \[2, 4\], or server=none"
            ):
                compatibility.check(compatibility.WITH_DATA, dealt)
        else:
            compatibility.check(compatibility.WITH_DATA, dealt)


@pytest.mark.parametrize("words", [{"lr": 0}, {"momentum": 1}, {"rank": 0}])
def test_settings_that_cannot_be_are_refused(words: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"server.{next(iter(words))}: expected"):
        fl.server_optimizers.FedAvgM(**words)
