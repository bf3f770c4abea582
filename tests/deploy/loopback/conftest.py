"""One federation over TLS with node keys on this machine, for all tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from trial import JOB, Trial, summary

SITES = {"north": 2, "south": 4}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    with Trial(tmp_path_factory.mktemp("trial") / "a b", SITES) as up:
        yield up


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The summary of the same job in this process, a client at a time as at sites."""
    from rich.console import Console

    from fedlora.cli.run_job import run_job
    from fedlora.config.composition import compose

    def go(*overrides: str) -> dict[str, Any]:
        config = compose([*JOB, "engine.fuse=1", *overrides])
        config.out = str(tmp_path_factory.mktemp("alone") / "out")
        return summary(run_job(config, Console()))

    return go
