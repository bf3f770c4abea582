"""A run's numbers as a table that any spreadsheet reads."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.callbacks.tracker import Tracker
from fedlora.storage.atomic import write_whole


@dataclass
class CSV(Tracker):
    """`metrics.csv`, a row a round; a column that a round lacks is empty in it.

    Args:
        clients: whether every client's own numbers go, too.
    """

    def begin(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        """Keep what is there of the rounds that are done."""
        self._file, self._rows = folder / "metrics.csv", list[dict[str, Any]]()
        if done and self._file.is_file():
            with self._file.open(encoding="utf-8", newline="") as file:
                rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
            self._rows = [row for row in rows if int(row["round"]) <= done]

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """Write the whole table, with one row more."""
        self._rows.append({"round": round, **numbers})
        text = io.StringIO()
        table = csv.DictWriter(text, dict.fromkeys(name for row in self._rows for name in row))
        table.writeheader()
        table.writerows(self._rows)
        write_whole(self._file, lambda file: file.write_text(text.getvalue(), encoding="utf-8", newline=""))
