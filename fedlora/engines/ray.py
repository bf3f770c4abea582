"""A run on a Ray cluster, for those who outgrow one machine: the groups of one process, over many actors."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.engines.base import Engine, Run, Session, fans
from fedlora.engines.simulation_grid import memory_of_group, together
from fedlora.errors import ConfigError
from fedlora.rounds.speeds import Speeds

BARE = 900 * 2**20  # bytes of an actor before it works: Python, torch, transformers, Ray's share


@dataclass(frozen=True)
class Ray(Engine):
    """Clients train in the actors of a Ray cluster; the result is that of one process, to the byte.

    Args:
        address: auto joins the cluster that runs on this machine, HOST:PORT another; None joins that of the
            variable RAY_ADDRESS where it is set, and else starts a Ray of this process's own.
        actors: processes that train side by side; None takes as many as the nodes have room for.
        cpus: cores of each actor.
        gpus: GPUs of each actor, or a share of one; None takes one where the model is on a GPU, else none.
        fuse: clients that train in one pass: "auto", or a number.
        wait: seconds to wait for the first actor, and for another where the last one has died.
        speeds: as for `InProcess`.
        tree: edges between server and clients: [4, 8] are 4 edges of 8 clients each; None for none.
    """

    address: str | None = None
    actors: int | None = None
    cpus: float = 1
    gpus: float | None = None
    fuse: int | str = "auto"
    wait: float = 600
    speeds: Mapping[str, Any] | str | None = None
    tree: Sequence[int] | None = None

    def __post_init__(self) -> None:
        together(self.fuse)
        fans(self.tree)
        if self.speeds is not None:
            Speeds.of(self.speeds)
        if self.actors is not None and self.actors < 1:
            raise ConfigError(
                f"engine.actors: expected a whole number of at least 1 or null, got {self.actors}"
            )
        if self.cpus <= 0 or (self.gpus is not None and self.gpus < 0):
            raise ConfigError(
                f"engine.cpus, engine.gpus: expected numbers above 0, got {self.cpus} and {self.gpus}"
            )

    def run(self, run: Run) -> None:
        """Run what is left of a federation on the cluster.

        Raises:
            ConfigError: Ray is not installed, there is no such cluster, its nodes have other versions, or no
                room.
            FedLoraError: no actor is left, or nothing came of the run.
        """
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                'engine=ray: Ray is not installed; pip install "fedlora[ray]", or use engine=inprocess'
            )
        from fedlora.engines import ray_cluster
        from fedlora.engines.ray_actors import Actors
        from fedlora.engines.ray_grid import RayGrid, packed_site

        with run.begin() as session:
            gpus = self._gpus(session)
            said = ray_cluster.connect(self.address, self.cpus * (self.actors or 1))
            there = ray_cluster.nodes()
            ray_cluster.check_versions(there)
            site = packed_site(session.runtime)
            memory = BARE if gpus else BARE + site.nbytes  # a pass takes about as much as the weights
            need = ray_cluster.Need(self.cpus, gpus, memory, site.nbytes)
            fit, what = ray_cluster.room(need, there)
            count = self.actors or min(fit, len(session.nodes))
            if not count:
                raise ConfigError(f"engine=ray: no node has room for an actor, which takes {need}; {what}")
            more = f", {fit} of which have room now ({what})" if fit < count else ""
            run.console.print(
                f"{said}; {count} actor{'s' * (count != 1)}, each of {need}{more}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            actors = Actors(site, need, count, self.wait, session.warn)
            try:
                fuse, memory = together(self.fuse), memory_of_group(session.runtime)
                session.run(RayGrid(session.runtime, session.nodes, actors, fuse, session.advance, memory))
            finally:
                actors.close()

    def _gpus(self, session: Session) -> float:
        """GPUs of an actor.

        Raises:
            ConfigError: an actor without a GPU would hold a model that is on one, or the reverse.
        """
        kind = session.runtime.base.device.type
        gpus = float(kind == "cuda") if self.gpus is None else self.gpus
        if bool(gpus) != (kind == "cuda"):
            raise ConfigError(
                f"engine.gpus: expected {'more than 0' if kind == 'cuda' else '0'} with model.device={kind}, "
                f"got {gpus:g}; say engine.gpus=null"
            )
        return gpus
