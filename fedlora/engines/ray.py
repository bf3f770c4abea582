"""A run on Flower's simulation: each client's work goes to one of several Ray actors, each with its own base.

On one machine the in-process engine is faster; this one is for a cluster that Ray knows of, and for GPUs.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass

from fedlora.engines.base import Engine, Run
from fedlora.engines.polling import PollingGrid
from fedlora.engines.ray_actors import Simulated, simulation
from fedlora.errors import ConfigError

BARE = 900 * 2**20  # bytes of an actor before it loads a model: Python, torch, transformers, Ray's share


@dataclass(frozen=True)
class Ray(Engine):
    """Flower's simulation on a Ray cluster, or on the cores of this machine.

    Args:
        actors: processes that train side by side; None takes one a core.
        gpus: share of a GPU that each takes.
        timeout: seconds after which a round goes on without those who have not answered.
        over_select: share of clients sampled beyond clients_per_round, for whose number a round waits.
        min_replies: share of the sampled clients without whose good updates a round changes nothing.
        wait: seconds to wait until Ray has made the nodes.
    """

    actors: int | None = None
    gpus: float = 0.0
    timeout: float | None = None
    over_select: float = 0.0
    min_replies: float = 0.0
    wait: float = 60

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise ConfigError(
                f"engine.actors: expected a whole number of at least 1 or null, got {self.actors}"
            )

    def run(self, run: Run) -> None:
        """Run what is left of a federation on Ray's actors.

        Raises:
            ConfigError: Ray is not installed, or the memory will not do.
        """
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                'engine=ray: Ray is not installed; pip install "fedlora[ray]", or use engine=inprocess'
            )
        with run.begin() as session:
            nodes = session.nodes
            actors = self.actors or min(os.cpu_count() or 1, len(nodes))
            _check_memory(actors, sum(p.nbytes for p in session.runtime.base.model.parameters()))
            client = Simulated(session.runtime_elsewhere, [node["rank"] for node in nodes])
            polling = functools.partial(
                PollingGrid, enough=session.enough, done=session.advance, late=session.warn
            )
            simulation(
                lambda grid, stopped: session.run(polling(grid, poll=0.1, stopped=stopped)),
                client,
                len(nodes),
                actors,
                self.gpus,
            )


def _check_memory(actors: int, base: int) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = actors * (BARE + 2 * base)
    if need > free:
        raise ConfigError(
            f"engine=ray: {actors} actors need about {need / 2**30:.1f} GB, {free / 2**30:.1f} are free; say "
            f"engine.actors={max(1, int(actors * free / need))}, or engine=inprocess, which has one base"
        )
