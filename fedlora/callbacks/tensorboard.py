"""A run's numbers as TensorBoard's event files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.callbacks.tracker import Tracker


@dataclass
class TensorBoard(Tracker):
    """Event files: tensorboard --logdir RUN/tracking, or the folder of many runs.

    Args:
        clients: whether every client's own numbers go, too.
    """

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Open a file; of rounds that are done again, TensorBoard shows the last."""
        from torch.utils.tensorboard import SummaryWriter

        # An event file that ends here hides the steps after it of those before.
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)  # type: ignore[no-untyped-call]

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """A scalar a number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def end(self, numbers: Mapping[str, float]) -> None:
        """Close the file."""
        self._writer.close()
