"""Flower's simulation on Ray gives what one process gives."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, FedLoraError

JOB = ("strategy=flexlora", "ranks=[2,4]", "rounds=2", "client.steps=3")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # all of Ray's own
]


def test_actors_reach_the_adapter_of_one_process(run: Callable[..., Any], tmp_path: Path) -> None:
    alone = run(*JOB, "engine.fuse=1")
    found = run(*JOB, "engine=ray", "engine.actors=2", out=tmp_path / "ray")
    assert found.sha == alone.sha
    for key in ("accuracy", "loss", "bytes_down", "bytes_up", "dropped", "clients"):
        assert found.summary[key] == alone.summary[key], key
    assert [(c["client"], c["examples"]) for c in found.clients] == [
        (c["client"], c["examples"]) for c in alone.clients
    ]


def test_what_goes_wrong_in_the_server_ends_the_simulation(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FedLoraError, match="no client sent a good update"):
        run(*JOB, "engine=ray", "engine.actors=1", "client.lr=1e30", "rounds=1", out=tmp_path / "ray")


def test_too_little_memory_is_said_before_ray_starts(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 2**18, "SC_PAGE_SIZE": 2**12}[name])
    with pytest.raises(ConfigError, match=r"4 actors need about .* GB, 1\.0 are free; say engine\.actors=1"):
        run(*JOB, "engine=ray", "engine.actors=4", out=tmp_path / "ray")


def test_a_missing_ray_is_named(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*fedlora\[ray\]"):
        run(*JOB, "engine=ray", out=tmp_path / "ray")
