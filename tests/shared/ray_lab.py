"""A client whose node can be killed after it has trained and before its result is on the way."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from fedlora.clients import LocalTraining
from fedlora.training.client import TrainRequest, TrainResult


@dataclass(frozen=True)
class Waiting(LocalTraining):
    """Trains, and on the node that the file `node` in `folder` names says so and never returns.

    Args:
        folder: where it looks and says so.
    """

    folder: str = ""

    def train(self, base: Any, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        found = super().train(base, assignments)
        named = Path(self.folder) / "node"
        if named.exists() and named.read_text() == ray.get_runtime_context().get_node_id():
            clients = ",".join(str(a.client) for a in assignments)
            (Path(self.folder) / f"trained-{clients}-round-{assignments[0].round}").touch()
            time.sleep(3600)
        return found


@dataclass(frozen=True)
class Deadly(LocalTraining):
    """Ends its process when it trains client 1."""

    def train(self, base: Any, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        if any(a.client == 1 for a in assignments):
            import os

            os._exit(1)
        return super().train(base, assignments)
