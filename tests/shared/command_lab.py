"""The command in this process: a small finished run, and the line in which an error ends."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SMALL = ("model=tiny", "data=tiny", "clients=3", "rounds=1", "ranks=4", "+data.source.rows=48")


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache and a working folder of its own, no network, and no pictures."""
    import fedlora.report

    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(fedlora.report, "write_report", lambda runs, to, *more: to)
        os.chdir(tmp_path_factory.mktemp("cwd"))
        yield
        os.chdir(here)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of an error that the user made."""

    def go(*words: str, code: int = 2) -> str:
        from fedlora.cli.main import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        said = capsys.readouterr().err
        assert caught.value.code == code, said
        assert len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        return said

    return go


@pytest.fixture
def no_run(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """The one line of an error in the settings of a run; nothing is left behind."""

    def go(*overrides: str) -> str:
        out = tmp_path / "out"
        said = refused("run", *SMALL, *overrides, f"out={out}")
        assert not out.exists()
        return said

    return go


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests copy it before they change it."""
    from fedlora.cli.main import main

    out = tmp_path_factory.mktemp("finished") / "run"
    main(["run", *SMALL, "strategy=flexlora", "ranks=[2,4]", f"out={out}"])
    return out
