"""What `fedlora run` does here before a deployment's server has begun, and when it is interrupted."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.callbacks.console import ConsoleProgress
from fedlora.cli.main import main
from fedlora.cli.run_job import run_job
from fedlora.config.composition import compose
from fedlora.config.resume import continued

pytestmark = pytest.mark.slow  # whole runs

DEPLOY = ("engine=deploy", "engine.superlink=lab", "model=tiny", "clients=2")
SITES = ("data=sites", "data.test=test.csv", "data.text=question", "data.label=topic")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a test file, an adapter and a folder called sites."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    Path("test.csv").write_text("question,topic\nw1 w2,a\nw3 w4,b\n")
    for folder in ("adapter", "sites", "model"):
        Path(folder).mkdir()
    for name in ("one", "two"):
        rows = [f"w{i} w{i + 1},{'ab'[i % 2]}\n" for i in range(20)]
        (tmp_path / "sites" / f"{name}.csv").write_text("question,topic\n" + "".join(rows))
    return tmp_path


def test_a_deployments_paths_are_absolute_wherever_the_configuration_has_them(here: Path) -> None:
    config = compose([*DEPLOY, *SITES, "lora.adapter=adapter", "model.path=model"])
    assert config.data.test == config.data.source.test == str(here / "test.csv")
    assert config.lora.adapter == str(here / "adapter")
    assert config.model.path == str(here / "model")
    config = compose([*DEPLOY, "data=files", "data.train=sites", *SITES[1:]])
    assert config.data.source.train == str(here / "sites")


def test_what_may_be_a_name_of_the_hub_stays_one(here: Path) -> None:
    assert compose([*DEPLOY, *SITES, "model.path=org/model"]).model.path == "org/model"


@pytest.mark.parametrize("word", ["data.test=nope.csv", "lora.adapter=nope"])
def test_a_path_that_is_not_there_is_refused_before_anything_is_sent(
    here: Path, refused: Callable[..., str], word: str
) -> None:
    key, _, path = word.partition("=")
    said = refused("run", *DEPLOY, *SITES, word, "out=out")
    assert key in said
    assert f"'{path}'" in said
    assert not Path("out").exists()


def test_a_failed_submit_leaves_the_folder_s_name_free(here: Path, refused: Callable[..., str]) -> None:
    for _ in range(2):
        assert "flwr run" in refused("run", *DEPLOY, *SITES, "out=out")
        assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine").write_text("kept")
    assert "flwr run" in refused("run", *DEPLOY, *SITES, "out=out")
    assert [path.name for path in Path("out").iterdir()] == ["mine"]


def test_a_folder_called_sites_is_a_folder(here: Path, capsys: Any) -> None:
    words = ("model=tiny", "data=files", "data.train=sites", "data.text=question", "data.label=topic")
    main(["run", *words, "data.partition=natural", "clients=null", "rounds=1", "ranks=4", "out=out"])
    assert "2 clients" in capsys.readouterr().out


def test_sites_without_a_deployment_are_refused(here: Path, refused: Callable[..., str]) -> None:
    assert "engine=deploy" in refused("run", "model=tiny", *SITES, "out=out")


def test_an_interrupted_run_says_how_it_goes_on(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", ("model=tiny", "data=tiny", "clients=2", "ranks=4", "rounds=2")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with monkeypatch.context() as patch:
        end = ConsoleProgress.on_round_end

        def interrupted(self: ConsoleProgress, *arguments: Any) -> None:
            end(self, *arguments)
            signal.raise_signal(signal.SIGINT)

        patch.setattr(ConsoleProgress, "on_round_end", interrupted)
        said = refused("run", *words, f"out={out}", code=130)
    signal.signal(signal.SIGINT, before)
    assert said == f"fedlora: interrupted; fedlora run resume={out} goes on from the last whole round\n"
    from rich.console import Console

    assert run_job(continued(out, [f"resume={out}"]), Console()) == out
    assert (out / "summary.json").is_file()
