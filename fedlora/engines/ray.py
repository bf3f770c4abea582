"""A run on Flower's simulation: each client's work goes to one of several Ray actors, each with its own base.

On one machine the in-process engine is faster; this one is for a cluster that Ray knows of, and for GPUs.
"""

import functools
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from fedlora.callbacks.console import Display
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.engines.polling import PollingGrid
from fedlora.engines.ray_actors import Simulated, simulation
from fedlora.errors import ConfigError
from fedlora.runner.assemble import assemble
from fedlora.storage.client_state import DownloadCache
from fedlora.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from fedlora.runner.run import ActiveRun

BARE = 900 * 2**20  # bytes of an actor before it loads a model: Python, torch, transformers, Ray's share


def simulate(run: "ActiveRun", progress: Display) -> None:
    """Run what is left of a federation on Ray.

    Raises:
        ConfigError: Ray is not installed, or the memory will not do.
    """
    config, job = run.config, run.job
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            'engine=ray: Ray is not installed; pip install "fedlora[ray]", or use engine=inprocess'
        )
    actors = config.engine.actors
    if actors is None:
        actors = min(os.cpu_count() or 1, job.rules.clients)
    if actors < 1:
        raise ConfigError(f"engine.actors: expected a whole number of at least 1 or null, got {actors}")
    _check_memory(actors, sum(p.nbytes for p in job.base.model.parameters()))
    site = Simulated(
        functools.partial(_site, OmegaConf.to_yaml(config), str(run.folder.path.absolute())), job.ranks
    )
    patience = functools.partial(PollingGrid, enough=job.enough, done=progress.advance, late=progress.warn)
    simulation(
        lambda grid, stopped: run.go(patience(grid, poll=0.1, stopped=stopped), progress),
        site,
        len(job.ranks),
        actors,
        config.engine.gpus,
    )


@functools.lru_cache(maxsize=1)
def _site(text: str, folder: str) -> ClientRuntime:
    """The clients' side in an actor, loaded once."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    keeps = RunFolder(Path(folder)).memory
    return replace(
        assemble(config).site, memory=keeps, shelf=DownloadCache(Path(folder) / "checkpoint" / "clients")
    )


def _check_memory(actors: int, base: int) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = actors * (BARE + 2 * base)
    if need > free:
        raise ConfigError(
            f"engine=ray: {actors} actors need about {need / 2**30:.1f} GB, {free / 2**30:.1f} are free; say "
            f"engine.actors={max(1, int(actors * free / need))}, or engine=inprocess, which has one base"
        )
