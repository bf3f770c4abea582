"""Reading the folder of a finished run: its configuration, logs and summary."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlora.core.natural_order import natural
from fedlora.errors import CheckpointError

ERROR = "error.txt"  # in the folder of a job that failed: why in its first line, then the traceback
SWEEP = "sweep.json"  # in the folder of a sweep: the arguments of its command, and the names of its jobs


@dataclass(frozen=True)
class Run:
    """One finished run, as read from its folder.

    Args:
        path: the run's folder, absolute.
        summary: final metrics, totals, hash and versions, from summary.json.
        metrics: an object for each round, from round 1 on.
        clients: an object for each client and round.
        config: the resolved configuration.
        data: the clients' rows and labels, from data.json; empty if the run had none or must not tell.
    """

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """The strategy's class name, such as FlexLoRA, or its YAML name if the config has no class."""
        settings = self.config.get("strategy")
        target = settings.get("_target_") if isinstance(settings, dict) else None
        return str(target or self.summary.get("strategy", "unnamed")).rsplit(".", 1)[-1]

    @property
    def metric(self) -> str:
        """The headline metric's key, such as `accuracy` or `perplexity`."""
        return str(self.summary.get("metric", "loss"))

    @property
    def more_is_better(self) -> bool:
        """Whether a higher headline metric is better: as the summary tells, else for accuracies only."""
        return bool(self.summary.get("more_is_better", self.metric.endswith("accuracy")))

    @property
    def local_metric(self) -> str:
        """The key of what clients measure on rows of their own beside the loss, such as `local_accuracy`."""
        keys = (key for line in (self.summary, *self.metrics) for key in line if key.startswith("local_"))
        return next((key for key in keys if key != "local_loss"), "local_accuracy")

    @property
    def counts(self) -> bool:
        """Whether `examples` are the clients' numbers of rows; if these are hidden, every client sends 1."""
        privacy = self.config.get("privacy")
        hidden = isinstance(privacy, dict) and privacy.get("public_counts") is False
        return not hidden and not self.config.get("secure_sum")

    def series(self, key: str) -> list[tuple[int, float]]:
        """(round, value) of each round in which `key` was measured; round 0 is before training."""
        rows = [{**(self.summary.get("initial") or {}), "round": 0}, *self.metrics]
        return [(row["round"], value) for row in rows if (value := number(row.get(key))) is not None]


def evaluated(runs: Iterable[Run]) -> str:
    """The rows on which runs were evaluated: "test rows", "validation rows", or "test or validation rows"."""
    parts = [settings if isinstance(settings := run.config.get("evaluate"), dict) else {} for run in runs]
    return f"{' or '.join(sorted({str(part.get('rows', 'test')) for part in parts}))} rows"


def number(value: object) -> float | None:
    """`value` as a float; None if it is not a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_runs(path: str | Path) -> list[Run]:
    """Every finished run in or below a folder, such as the runs of a sweep, in the order of their names.

    Raises:
        CheckpointError: there is no finished run, or a file of one is broken.
    """
    folders = (summary.parent for summary in Path(path).glob("**/summary.json"))
    found = sorted(folders, key=lambda folder: [natural(part) for part in folder.parts])
    return [read_run(folder) for folder in found] or [read_run(path)]


def missing(path: str | Path) -> list[str]:
    """The names of the unfinished jobs in a sweep's folder; empty for the folder of a run."""
    folder = Path(path)
    if not (folder / SWEEP).is_file():
        return []
    jobs = read_object(folder / SWEEP).get("jobs")
    return [str(job) for job in jobs or [] if not (folder / str(job) / "summary.json").is_file()]


def read_run(path: str | Path) -> Run:
    """Read the folder of one finished run.

    An incomplete last line of a .jsonl file, which a killed process may leave, is skipped.

    Raises:
        CheckpointError: the path is no folder, the run is unfinished, or a file is missing or broken.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"{path}: expected the folder of a run, found {_kind(folder)}; check the path")
    if not any((folder / name).is_file() for name in ("config.yaml", "summary.json")):
        raise CheckpointError(
            f"{path}: expected the folder of a run, found no config.yaml and no summary.json; check it"
        )
    if not (folder / "summary.json").is_file():
        raise CheckpointError(
            f"{path}: no summary.json, so the run is unfinished; continue it with `fedlora run resume={path}`"
        )
    return Run(
        path=folder,
        summary=read_object(folder / "summary.json"),
        metrics=read_lines(folder / "metrics.jsonl"),
        clients=read_lines(folder / "clients.jsonl"),
        config=read_config(folder / "config.yaml"),
        data=read_object(folder / "data.json") if (folder / "data.json").is_file() else {},
    )


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: a run's folder must hold this file, but it cannot be read ({error.strerror}); "
            f"copy the whole folder again or run again"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    return _parse(_bytes(path), str(path))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:  # also what a wrong encoding raises
        raise CheckpointError(
            f"{where}: expected one JSON object, found broken text ({error}); restore the file or run again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: expected one JSON object, found {type(value).__name__}; restore the file or run again"
        )
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of one a line; an incomplete last line is left out.

    Raises:
        CheckpointError: the file is missing, or another line is broken.
    """
    numbered = [(at, line) for at, line in enumerate(_bytes(path).split(b"\n"), start=1) if line.strip()]
    rows = []
    for at, line in numbered:
        try:
            rows.append(_parse(line, f"{path}:{at}"))
        except CheckpointError:
            if at != numbered[-1][0]:
                raise
    return rows


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    try:
        value = yaml.safe_load(_bytes(path))
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = f"{path}:{at.line + 1}" if at else str(path)
        raise CheckpointError(f"{where}: not YAML; restore the file or run again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected settings as keys and values, found {type(value).__name__}; restore the file"
        )
    return value
