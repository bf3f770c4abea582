"""Folders that `fedlora deploy init` writes."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment behind a proxy, moved after it was made; tests only read it."""
    from fedlora.cli.main import main

    at = tmp_path_factory.mktemp("a b")
    servers = [word for name in ("fl.example.org", "192.0.2.7", "2001:db8::7") for word in ("--server", name)]
    main(["deploy", "init", str(at / "lab"), *servers, "--site", "ward-3:4", "--site", "ward-9"])
    return (at / "lab").rename(at / "moved (1) lab")


@pytest.fixture(scope="session")
def local_deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment on one machine."""
    from fedlora.cli.main import main

    folder = tmp_path_factory.mktemp("trial") / "lab"
    main(["deploy", "init", str(folder), "--sites", "2", "--port", "18000"])
    return folder


@pytest.fixture(params=["deployment", "local_deployment"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]
