"""A run's numbers as a run of Weights & Biases."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.callbacks.tracker import Tracker, own_id
from fedlora.errors import ConfigError


@dataclass
class WandB(Tracker):
    """A run of Weights & Biases, on disk alone (`wandb sync` sends it later) unless it is to go online.

    Args:
        project: its project.
        mode: offline or online.
        clients: whether every client's own numbers go, too.
    """

    project: str = "fedlora"
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ConfigError(f"track.mode: expected offline or online, got '{self.mode}'")

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Start it, or go on with it."""
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=30)
        own = own_id(folder / "wandb-id", lambda: uuid.uuid4().hex[:12])
        where = {"project": self.project, "mode": self.mode, "dir": str(folder), "name": folder.parent.name}
        self._run = wandb.init(id=own, resume="allow", config=dict(config), settings=settings, **where)

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """A step a round."""
        self._run.log(dict(numbers), step=round)

    def end(self, numbers: Mapping[str, float]) -> None:
        """Close it."""
        self._run.summary.update(dict(numbers))
        self._run.finish()
