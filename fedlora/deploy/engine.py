"""The engine of real sites: the run is submitted to a SuperLink, and followed from here."""

from dataclasses import dataclass
from typing import ClassVar

from fedlora.engines.base import Engine, Run


@dataclass(frozen=True)
class Deployment(Engine):
    """Real sites behind a Flower SuperLink.

    Args:
        superlink: its name in Flower's config.toml, which `fedlora deploy init` writes.
        experiment: under which server and sites keep what belongs to this run; None makes a name.
        timeout: seconds after which a round goes on without those who have not answered.
        over_select: share of clients sampled beyond clients_per_round, for whose number a round waits.
        min_replies: share of the sampled clients without whose good updates a round changes nothing.
        wait: seconds to wait for sites: all of `clients` at the start, later those that a round needs.
    """

    sites: ClassVar[bool] = True

    superlink: str
    experiment: str | None = None
    timeout: float | None = 3600
    over_select: float = 0.0
    min_replies: float = 0.5
    wait: float = 600

    def run(self, run: Run) -> None:
        """Submit the run, follow it, and bring back what it leaves."""
        from fedlora.deploy.submit import deploy

        deploy(run)
