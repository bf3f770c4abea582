import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedlora.cli.sweep_job as swept
from fedlora.cli.main import main
from fedlora.cli.sweep_job import Sweep
from fedlora.config.composition import compose
from fedlora.config.instantiate import Trust, read
from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow

JOB = ("model=tiny", "data=tiny", "clients=3", "rounds=1", "+data.source.rows=48", "evaluate.every=0")


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra reads the command line and its environment; both are as before after a test."""
    monkeypatch.setattr("sys.argv", ["fedlora"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def sweep(*words: str, code: int | None = None) -> None:
    if code is None:
        main(["run", "-m", *JOB, *words])
        return
    with pytest.raises(SystemExit) as caught:
        main(["run", "-m", *JOB, *words])
    assert caught.value.code == code


def shas(folder: Path) -> dict[str, str]:
    found = sorted(folder.glob("*/summary.json"))
    return {file.parent.name: json.loads(file.read_text())["adapter_sha256"] for file in found}


def test_a_failed_job_stops_no_other_and_the_same_command_runs_what_is_missing(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "a sweep", ("strategy=fedit,flexlora", "ranks=4,[2,4]")
    sweep(*words, f"out={out}", code=2)
    said = capsys.readouterr()
    assert "3 finished, 1 failed, 0 missing" in said.out
    assert "failed: strategy=fedit,ranks=[2,4]: strategy FedIT combines clients of one rank" in said.err
    first = shas(out)
    assert len(first) == 3

    (out / "strategy=flexlora,ranks=4" / "summary.json").unlink()
    monkeypatch.setattr(swept, "run_job", stopped := Recorded(swept.run_job))
    main_again = ["run", f"resume={out}"]  # -m is in the folder
    with pytest.raises(SystemExit):
        main(main_again)
    assert "4 jobs, 2 finished before" in capsys.readouterr().out
    resumed, failed = sorted(stopped.configs, key=lambda c: c.resume is None)
    assert resumed.resume == str(out / "strategy=flexlora,ranks=4")
    assert failed.strategy._target_.endswith("FedIT")
    assert shas(out) == first


class Recorded:
    def __init__(self, run: Callable[..., Path]) -> None:
        self.run, self.configs = run, list[Any]()

    def __call__(self, config: Any, console: Any) -> Path:
        self.configs.append(config)
        return self.run(config, console)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("seed=0,1",)
    sweep(*words, f"out={whole}")
    run_job, calls = swept.run_job, []

    def interrupted(config: Any, console: Any) -> Path:
        calls.append(config.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_job(config, console)

    with monkeypatch.context() as patch:
        patch.setattr(swept, "run_job", interrupted)
        sweep(*words, f"out={cut}", code=130)
    assert "1 finished, 0 failed, 1 missing" in capsys.readouterr().out
    main(["report", str(cut)])
    assert "1 runs of the sweep" in capsys.readouterr().out
    sweep(*words, f"out={cut}")
    assert shas(cut) == shas(whole)


def test_a_warm_run_s_adapter_is_a_cold_one_s(tmp_path: Path) -> None:
    from fedlora.runner import load_data, load_models

    sweep("seed=0,1", "strategy=flexlora,fedit", f"out={tmp_path / 'warm'}")
    warm = shas(tmp_path / "warm")
    hits = load_data._encoded.cache_info().hits
    for seed in (1, 0):
        load_models.shared.cache_clear()
        load_data._encoded.cache_clear()
        main(["run", *JOB, f"seed={seed}", "strategy=fedit", f"out={tmp_path / f'cold/{seed}'}"])
        assert shas(tmp_path / "cold")[str(seed)] == warm[f"seed={seed},strategy=fedit"]
    assert hits
    assert len(set(warm.values())) == 4


def test_pairs_are_jobs_of_their_own_times_what_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any, console: Any) -> Path:
        raise ConfigError("enough")

    monkeypatch.setattr(swept, "run_job", seen := Recorded(refuse))
    fedit, private = "{strategy: fedit, client.steps: 7}", "{strategy: dplora, privacy.epsilon: 3}"
    sweep(f"pairs=[{fedit}, {private}]", "seed=0,1", f"out={tmp_path}", code=2)
    names = {Path(c.out).name: c for c in seen.configs}
    fedit, private = "strategy=fedit,client.steps=7", "strategy=dplora,privacy.epsilon=3"
    assert names.keys() == {f"seed={seed},{pair}" for seed in (0, 1) for pair in (fedit, private)}
    assert {c.client.steps for name, c in names.items() if fedit in name} == {7}
    assert {c.privacy.epsilon for name, c in names.items() if private in name} == {3}
    assert {c.seed for c in seen.configs} == {0, 1}
    assert not any(c.pairs for c in seen.configs)


def test_an_experiment_lists_pairs() -> None:
    from fedlora.cli.sweep import _plan
    from fedlora.config import composition

    composition.register()
    pairs, jobs = _plan(["experiment=ranks", "seed=0,1,2"])
    assert [pair["strategy"] for pair in pairs] == ["fedit", "fedit", "flexlora", "hetlora"]
    assert jobs is not None
    assert len(jobs) == 12


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("pairs=[{strategy: fedditt}]",), ["fedditt", "fedit"]),
        (("pairs=[{ranke: 3}]",), ["ranke", "ranks"]),
        (("pairs=[3]",), ["pairs", "3"]),
        (("seed=range(0,",), ["range"]),
        (("client.lr=interval(0,1)",), ["sweep"]),
        (("seed=0,1", "resume=nowhere"), ["nowhere"]),
    ],
)
def test_a_wrong_sweep_is_one_line(
    refused: Callable[..., str], tmp_path: Path, words: tuple[str, ...], named: list[str]
) -> None:
    out = [f"out={tmp_path / 'out'}"] if "resume" not in words[-1] else []
    said = refused("run", "-m", *JOB, *words, *out)
    assert all(word in said for word in named), said
    assert not (tmp_path / "out").exists()


def test_pairs_need_a_sweep(no_run: Callable[..., str]) -> None:
    assert "-m" in no_run("pairs=[{ranks: 4}]")


def test_other_settings_are_not_taken_for_a_job(tmp_path: Path, capsys: Any) -> None:
    main(["run", *JOB, "seed=1", f"out={tmp_path / 'seed=1'}"])
    sweep("seed=1,2", "client.steps=1", f"out={tmp_path}", code=2)
    said = capsys.readouterr().err
    assert "seed=1: out:" in said
    assert "other settings (client)" in said
    assert sorted(shas(tmp_path)) == ["seed=1", "seed=2"]


def test_a_folder_holds_one_sweep_which_may_grow(
    tmp_path: Path, refused: Callable[..., str], capsys: Any
) -> None:
    out = tmp_path / "out"
    sweep("seed=0,1", f"out={out}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for other in (["seed=0,1", "ranks=4"], ["seed=0"], ["seed=5,6"], ["client.lr=1e-3,1e-2"]):
        said = refused("run", "-m", *JOB, *other, f"out={out}")
        assert "holds another sweep" in said
        assert f"fedlora run -m resume={out}" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    sweep("seed=0,1,2", f"out={out}")
    assert "3 jobs, 2 finished before" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["lora.rank_pattern", "lora.alpha_pattern"])
def test_patterns_are_given_swept_and_refused_without_a_plus(tmp_path: Path, key: str, capsys: Any) -> None:
    name = key.partition(".")[2]
    sweep(f"{key}={{query: 4}},{{query: 2}}", "lora.alpha=8", f"out={tmp_path}")
    found = [read(path, Trust()).lora[name].query for path in sorted(tmp_path.glob("lora*"))]
    assert found == [2, 4]
    assert compose([*JOB, f"{key}.query=3"]).lora[name] == {"query": 3}


@pytest.mark.parametrize(
    "word", ["client.lr.x=3", "ranks.x=3", "lora.rank_patern={query: 4}", "+clients.x=3"]
)
def test_no_plus_is_advised(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*JOB, word])
    assert "append" not in str(caught.value)
    assert " +" not in str(caught.value).replace(word, "")


def test_a_kept_sweep_says_neither_how_it_is_launched_nor_what_is_trusted(tmp_path: Path) -> None:
    sweep("seed=0,1", "allow=[my_module]", "hydra.sweeper.max_batch_size=1", f"out={tmp_path}")
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept == {"words": [*JOB, "seed=0,1"], "jobs": ["seed=0", "seed=1"]}


def test_a_job_returns_the_headline_metric_which_an_optimiser_needs(tmp_path: Path) -> None:
    from fedlora.config.composition import compose

    config = compose([*JOB, "evaluate.every=1"])
    this = Sweep(tmp_path, fixed=frozenset({"rounds"}))
    result = this.run(config.copy(), ["rounds=1", "client.lr=0.01"])
    summary = json.loads((tmp_path / "client.lr=0.01" / "summary.json").read_text())
    assert result == summary["accuracy"]
    assert this.run(config.copy(), ["client.lr=0.01"]) == result  # it is not run again
    config.ranks = 0
    assert this.run(config, ["client.lr=0.02"]) is None


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["+a=1", "b='x y'", "c=[2,4]"], "a=1,b=xy-"),
        (["data.train='a/b.csv'"], "data.train=a-b.csv-"),
        ([f"a={'x' * 300}"], "a=xxxx"),
        ([], "run"),
    ],
)
def test_names_of_jobs(overrides: list[str], name: str) -> None:
    made = Sweep(Path(), fixed=frozenset({"d"})).name([*overrides, "d=7"])
    assert made.startswith(name.rstrip("-"))
    assert "/" not in made
    assert len(made) < 140


def test_names_differ_where_jobs_do() -> None:
    names = [Sweep(Path()).name([f"a={value}"]) for value in ("x/y", "x-y", "'x/ y'", "x" * 200, "x" * 201)]
    assert len(set(names)) >= 4


def test_a_broken_sweep_file_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{")
    assert "sweep.json" in refused("run", f"resume={tmp_path}")
