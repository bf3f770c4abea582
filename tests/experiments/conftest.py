import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import JOB, SITES, Asked, rows
from omegaconf import DictConfig

from fedlora.config.composition import compose
from fedlora.deploy.site_config import Invitation
from fedlora.deploy.worker import Worker
from fedlora.runner.assemble import assemble
from fedlora.runner.load_models import heads_of

SMALL = ("model=tiny", "data=tiny", "clients=3", "rounds=1", "ranks=4", "+data.source.rows=48")


@pytest.fixture(scope="session", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
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


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment behind a proxy, moved after it was made; tests only read it."""
    from fedlora.cli.main import main

    at = tmp_path_factory.mktemp("a b")
    servers = [word for name in ("fl.example.org", "192.0.2.7", "2001:db8::7") for word in ("--server", name)]
    main(["deploy", "init", str(at / "lab"), *servers, "--site", "ward-3:4", "--site", "ward-9"])
    return (at / "lab").rename(at / "moved (1) lab")


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment on one machine."""
    from fedlora.cli.main import main

    folder = tmp_path_factory.mktemp("trial") / "lab"
    main(["deploy", "init", str(folder), "--sites", "2", "--port", "18000"])
    return folder


@pytest.fixture(params=["lab", "trial"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DictConfig]:
    """The configuration of a run over sites, as a server sends it."""
    test = rows(tmp_path_factory.mktemp("server") / "test.jsonl")
    known: dict[tuple[str, ...], DictConfig] = {}

    def go(*more: str) -> DictConfig:
        if more not in known:
            data = [] if "data=tiny" in more else [*SITES, f"data.test={test}"]
            known[more] = compose([*JOB, *data, *more])
        return known[more].copy()

    return go


@pytest.fixture(scope="session")
def model(composed: Any) -> str:
    """The fingerprint of the server's model."""
    job = assemble(composed())
    return job.base.fingerprint(heads_of(composed(), job.base))


@pytest.fixture
def site(tmp_path: Path) -> dict[str, Any]:
    """What a site says in its node.toml."""
    return {"client": 0, "state": str(tmp_path / "state"), "data": str(rows(tmp_path / "own" / "rows.jsonl"))}


@pytest.fixture
def ask(model: str) -> Callable[..., Asked]:
    """A worker of a site's, and messages to it."""

    def make(config: DictConfig, site: dict[str, Any], **plan: Any) -> Asked:
        known = {"experiment": "trial", "labels": ("a", "b"), "model": model, **plan}
        return Asked(Worker(), config, site, Invitation(**known))

    return make
