"""The folder of a run, and the order of its writes: a kill at any instant loses at most one round."""

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from fedlora.core.messages import State
from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import Ledger
from fedlora.privacy.ledger_files import LEDGER, read_ledger
from fedlora.storage.atomic import write_whole
from fedlora.storage.checkpoint import digest_of_state, number_of, read_checkpoint
from fedlora.storage.client_state import ClientStore
from fedlora.storage.run_lock import hold
from fedlora.storage.tensors import write_tensors

KEPT = 2  # checkpoints that are kept; the second to last is used if the last is damaged
SELECTED = "selected"  # begins the name of a selected state's file
SERVER = -1  # the server's id among the ids of clients


class RunFolder:
    """The files of a run in one folder. Nothing is pickled.

    `config.yaml` has the settings, `metrics.jsonl` a line for each round, `clients.jsonl` a line for each
    client and round, `summary.json` the results, and `checkpoint/` the state. Files are written under a
    temporary name, synced and renamed. A round's lines are appended to the logs before its checkpoint is
    written, so lines without a checkpoint belong to a round that is repeated.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.schedule = ""  # of the checkpoint that was loaded, as `finish_round` was given it
        self._needed: set[int] = set()  # rounds whose states the last checkpoint still needs

    @classmethod
    def create(cls, path: Path, config: str) -> "RunFolder":
        """Make the folder of a new run.

        Args:
            path: a folder that holds no run yet; it is made if it is missing.
            config: the resolved configuration as YAML.

        Raises:
            ConfigError: the folder holds a run already, or it cannot be made.
        """
        folder = cls(path)
        if (path / "config.yaml").exists():
            raise ConfigError(
                f"out: '{path}' holds a run already; name another folder, or continue it with resume={path}"
            )
        try:
            (path / "checkpoint").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: cannot make the folder '{path}': {error.strerror}") from error
        for log in ("metrics.jsonl", "clients.jsonl"):
            (path / log).touch()
        folder.write_config(config)
        return folder

    def discard(self, *more: str) -> None:
        """Remove the files that `create` made and the files in `more`, for a run that did not start."""
        for name in ("config.yaml", "metrics.jsonl", "clients.jsonl", *more):
            (self.path / name).unlink(missing_ok=True)
        for place in (self.path / "checkpoint", self.path):
            with suppress(OSError):  # the folder has other files
                place.rmdir()

    def hold(self) -> IO[bytes]:
        """Lock the run for this process, until the returned file is closed or the process ends.

        Two processes that continue one run would overwrite each other's entries in the privacy ledger.

        Raises:
            ConfigError: another process holds the lock.
        """
        return hold(self.path)

    def write_config(self, config: str) -> None:
        """Write the resolved configuration."""
        self.write("config.yaml", lambda file: file.write_text(config, encoding="utf-8"))

    @property
    def started(self) -> bool:
        """Whether the run has a checkpoint."""
        return bool(self._checkpoints())

    @property
    def last_checkpoint(self) -> Path:
        """The file of the newest checkpoint."""
        return self._checkpoints()[-1]

    @property
    def finished(self) -> bool:
        """Whether the run has ended and has a summary."""
        return (self.path / "summary.json").is_file()

    def summary(self) -> dict[str, Any]:
        """The content of summary.json; empty before the end of the run."""
        if not self.finished:
            return {}
        found: dict[str, Any] = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        return found

    def write(self, name: str, make: Callable[[Path], Any]) -> Path:
        """Write a file or folder of the run atomically, see `write_whole`."""
        return write_whole(self.path / name, make)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON object with indentation."""
        text = json.dumps(value, indent=2) + "\n"
        self.write(name, lambda file: file.write_text(text, encoding="utf-8"))

    def write_lines(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a JSON object on each line, without escaping letters outside of ASCII."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.write(name, lambda file: file.write_text(text, encoding="utf-8"))

    def finish_round(
        self,
        round: int,
        state: State,
        metrics: Mapping[str, Any],
        clients: Sequence[Mapping[str, Any]],
        schedule: str = "",
        needed: Collection[int] = (),
    ) -> None:
        """Append a round's lines to both logs, then write the state after the round.

        Args:
            round: its number.
            state: the state after it.
            metrics: its line of metrics.jsonl.
            clients: its lines of clients.jsonl.
            schedule: what the scheduler has to know to go on from here; empty for nothing.
            needed: the rounds after whose states clients still work; those checkpoints are kept.
        """
        _append(self.path / "clients.jsonl", clients)
        _append(self.path / "metrics.jsonl", [metrics])
        self.save_state(round, state, schedule=schedule, needed=needed)

    def save_state(
        self,
        round: int,
        state: State,
        kind: str = "round",
        schedule: str = "",
        needed: Collection[int] = (),
    ) -> None:
        """Write the state after a round as a checkpoint with a digest, and remove those that none needs."""
        tensors, header = state.pack()
        path = self.path / "checkpoint" / f"{kind}-{round:06d}.safetensors"
        more = {"schedule": schedule, "needed": json.dumps(sorted(needed))} if schedule else {}
        write_tensors(path, tensors, {"round": str(round), "state": header, **more}, digest_of_state)
        kept = {*needed} | self._needed  # of this checkpoint, and of the one before
        for old in self._checkpoints(kind)[:-KEPT]:
            if kind == SELECTED or number_of(old) not in kept:
                old.unlink()
        if kind != SELECTED:
            self._needed = {*needed}

    def state_after(self, round: int) -> State:
        """The state after a round that `finish_round` was told to keep.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        return read_checkpoint(self.path / "checkpoint" / f"round-{round:06d}.safetensors")[1]

    def save_selected(self, round: int, state: State) -> None:
        """Keep the state of a round that may become the run's result, beside the last ones."""
        self.save_state(round, state, SELECTED)

    def selected(self, most: int) -> tuple[int, State] | None:
        """The last selected state of a round up to this one, and its round; None if there is none."""
        found = [path for path in self._checkpoints(SELECTED) if number_of(path) <= most]
        return read_checkpoint(found[-1])[:2] if found else None

    def result(self) -> tuple[int, State]:
        """The state that the run has come to, and its round: the one that its summary selects, or the last.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        if (round := self.summary().get("selected_round")) is None:
            return self.read_state()
        if (found := self.selected(round)) is None or found[0] != round:
            raise CheckpointError(
                f"'{self.path}' lacks the state of round {round}, which its summary selects"
            )
        return found

    @property
    def result_files(self) -> list[Path]:
        """The files of the last state and, where one was selected, of the selected state."""
        return [self.last_checkpoint, *self._checkpoints(SELECTED)[-1:]]

    def load_state(self) -> tuple[int, State]:
        """The newest undamaged state and its round; both logs are truncated to that round."""
        round, state, header = self._newest()
        self.schedule = header.get("schedule", "")
        self._needed = {*json.loads(header.get("needed", "[]"))}
        for log in ("metrics.jsonl", "clients.jsonl"):
            self.write(log, partial(_cut, self.path / log, round))
        return round, state

    def read_state(self) -> tuple[int, State]:
        """The newest undamaged state and its round, without changing any file.

        Raises:
            CheckpointError: there is no undamaged checkpoint.
        """
        return self._newest()[:2]

    def _newest(self) -> tuple[int, State, Mapping[str, str]]:
        for path in reversed(self._checkpoints()):
            try:
                return read_checkpoint(path)
            except (CheckpointError, KeyError, ValueError) as error:
                warnings.warn(f"{path.name} is damaged ({error}); using the one before it", stacklevel=2)
        raise CheckpointError(f"'{self.path}' has no undamaged checkpoint to continue from; start a new run")

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return _lines(self.path / "metrics.jsonl")

    @property
    def memory(self) -> ClientStore:
        """The state of the clients, in a simulation on this machine."""
        return ClientStore(self.path / "checkpoint" / "clients")

    @property
    def ledger(self) -> Path:
        """The file of the server's privacy ledger."""
        return self.path / "checkpoint" / LEDGER

    def ledgers(self) -> dict[int, Ledger]:
        """The privacy ledgers by client id; under client-level privacy the server's under the id SERVER."""
        server = read_ledger(self.ledger)
        return self.memory.ledgers() | ({SERVER: server} if server else {})

    def clients(self) -> list[dict[str, Any]]:
        """The lines of clients.jsonl."""
        return _lines(self.path / "clients.jsonl")

    def _checkpoints(self, kind: str = "round") -> list[Path]:
        return sorted((self.path / "checkpoint").glob(f"{kind}-*.safetensors"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; an incomplete last line is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _cut(source: Path, round: int, target: Path) -> None:
    """Copy the complete lines up to a round; later lines belong to an interrupted round."""
    kept = []
    for line in source.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["round"] > round:
            break
        kept.append(line)
    target.write_text("".join(kept), encoding="utf-8")
