"""The progress of a run over a log: what a server tells, line by line, to whoever follows it elsewhere."""

import base64
import io
import json
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora.callbacks.base import Callback, Callbacks, RunHandle
from fedlora.errors import CheckpointError

MARK = "fedlora-told "  # begins every line that is ours
PIECE = 48_000  # bytes of a file in a line


class ProgressSender(Callback):
    """Tells of a run that somebody follows through a log: a JSON object a line, numbered from 0."""

    def __init__(self) -> None:
        self._said = 0

    def tell(self, what: str, *values: Any) -> None:
        """Say one thing."""
        line = json.dumps([self._said, what, *values])
        self._said += 1
        sys.stdout.write(f"{MARK}{line}\n")  # in one piece: other threads write, too
        sys.stdout.flush()

    def on_round_begin(self, run: RunHandle, round: int, clients: int) -> None:
        """A round begins with so many clients."""
        self.tell("begin", round, clients)

    def on_client_done(self, run: RunHandle, count: int) -> None:
        """So many clients have finished."""
        self.tell("advance", count)

    def on_round_end(self, run: RunHandle, metrics: Mapping[str, Any]) -> None:
        """A round has ended with this line of metrics.jsonl."""
        self.tell("end", dict(metrics))

    def on_warning(self, run: RunHandle, text: str) -> None:
        """Something that the user should know."""
        self.tell("warn", text)

    def bring(self, folder: Path, names: Iterable[str]) -> None:
        """Send files and folders of a run, as far as they exist."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files_of(folder, names):
                archive.write(path, path.relative_to(folder))
        data = packed.getvalue()
        pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
        for i, piece in enumerate(pieces):
            self.tell("piece", i, len(pieces), base64.b64encode(piece).decode())
        self.tell("brought", zlib.crc32(data))


def files_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files that these names of files and folders stand for, as far as they exist."""
    found = (path for name in names for path in [folder / name, *sorted((folder / name).rglob("*"))])
    return [path for path in found if path.is_file()]


class ProgressReceiver:
    """The other end of a `ProgressSender`: the same calls on callbacks here, and the files into a folder.

    Args:
        folder: where files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._heard = 0
        self._pieces: list[bytes] = []

    def hear(self, line: str, callbacks: Callbacks) -> tuple[str, list[Any]] | None:
        """Take one line of a log; what it says where that is no call of a callback.

        A log that is read again from its beginning says nothing twice.

        Raises:
            CheckpointError: files came damaged.
        """
        _, mark, text = line.partition(MARK)
        try:
            number, what, *values = json.loads(text) if mark else (None, "")
        except ValueError:
            return None
        if not mark or number != self._heard:
            return None
        self._heard += 1
        calls: dict[str, Callable[..., None]] = {
            "begin": callbacks.round_begin,
            "advance": callbacks.client_done,
            "end": callbacks.round_end,
            "warn": callbacks.run.warn,
        }
        if what in calls:
            calls[what](*values)
            return None
        if what == "piece":
            self._pieces.append(base64.b64decode(values[2]))
            return None
        if what == "brought":
            self._unpack(values[0])
        return what, values

    def _unpack(self, seal: int) -> None:
        data, self._pieces = b"".join(self._pieces), []
        if zlib.crc32(data) != seal:
            raise CheckpointError(
                "the run's files came damaged through the log; resume=DIR fetches them again"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=self._folder, prefix="brought-") as place,
            zipfile.ZipFile(io.BytesIO(data)) as archive,
        ):
            archive.extractall(place)  # keeps to the folder, whatever names say
            found = [path for path in Path(place).rglob("*") if path.is_file()]
            # The summary says that all is there.
            for path in sorted(found, key=lambda path: path.name == "summary.json"):
                to = self._folder / path.relative_to(place)
                to.parent.mkdir(parents=True, exist_ok=True)
                path.replace(to)
