"""How far a run is, from the files in its folder alone, while another process may be writing them.

Nothing is written, and the run is never kept waiting. Its folder may lie on a file system that several
machines share.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedlora.core.natural_order import natural
from fedlora.errors import CheckpointError
from fedlora.report.alarms import KEPT
from fedlora.report.read import ERROR, SWEEP, number, read_config, read_lines, read_object
from fedlora.storage.run_lock import held

DEPLOYED = "deploy.json"  # in the folder of whoever has submitted a run to a SuperLink, and of the server
RECENT = 5  # rounds whose median is the time that a round takes
SLOW = 5.0  # times the median after which a round is worth a warning
LONG = 10.0  # seconds that no round is too slow for
BLOCK = 1 << 16  # bytes that are read at a time from the end of clients.jsonl
BARS = "▁▂▃▄▅▆▇█"

Stage = Literal["running", "finished", "died", "failed", "elsewhere"]


@dataclass(frozen=True)
class Progress:
    """A run as its files show it at one moment.

    Args:
        path: its folder.
        stage: "running"; "finished" with a summary; "died" where no process holds the folder; "failed", a job
            of a sweep; "elsewhere" where a server of another machine writes the rounds.
        config: its settings.
        metrics: the lines of metrics.jsonl of the rounds that are done.
        clients: the lines of clients.jsonl of the last of them.
        summary: its results; empty before its end.
        waited: seconds since the last round was written, or since the start.
        why: the reason of a failure, or where the run is.
    """

    path: Path
    stage: Stage
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    clients: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    waited: float = 0.0
    why: str = ""

    @property
    def title(self) -> str:
        """What runs: "FlexLoRA: minilm on trec"; its folder's name where that is not known."""
        parts = [self.config.get(name) for name in ("strategy", "model", "data")]
        strategy, model, data = (part if isinstance(part, dict) else {} for part in parts)
        name = str(strategy.get("_target_", "")).rsplit(".", 1)[-1]
        return f"{name}: {model.get('name')} on {data.get('name')}" if name else self.path.name

    @property
    def rounds(self) -> int:
        """How many rounds the run is to have."""
        return int(number(self.config.get("rounds")) or 0)

    @property
    def done(self) -> int:
        """How many rounds are done."""
        return int(self.metrics[-1]["round"]) if self.metrics else 0

    @property
    def metric(self) -> str:
        """The headline metric: the one that follows the loss in the lines, or the loss itself."""
        names = next((list(line) for line in self.metrics if "loss" in line), [])
        after = names[names.index("loss") + 1 :] if names else []
        named = [name for name in after[:1] if name not in ("train_loss", "away", "clipped")]
        return str(self.summary.get("metric") or next(iter(named), "loss"))

    @property
    def course(self) -> list[tuple[int, float]]:
        """(round, headline metric) of each round that was evaluated."""
        found = ((int(line["round"]), number(line.get(self.metric))) for line in self.metrics)
        return [(at, value) for at, value in found if value is not None]

    @property
    def best(self) -> tuple[int, float] | None:
        """The round with the best headline metric; None where nobody has said which values are better."""
        more, metric = self.summary.get("more_is_better"), self.metric
        if more is None and not metric.endswith(("accuracy", "loss", "perplexity")):
            return None
        more = metric.endswith("accuracy") if more is None else more
        return (max if more else min)(self.course, key=lambda point: point[1], default=None)

    @property
    def round_seconds(self) -> float | None:
        """The seconds of a round, the median of the last five; None before the first."""
        found = [line["seconds"] for line in self.metrics[-RECENT:]]
        return statistics.median(found) if found else None

    @property
    def left(self) -> float | None:
        """The seconds until the last round, if rounds take as long as the last five; None if not known."""
        one = self.round_seconds
        if self.stage != "running" or one is None:
            return None
        return max(0.0, (self.rounds - self.done) * one - min(self.waited, one))

    def total(self, key: str) -> float:
        """The sum of a key over the rounds, such as "bytes_up"."""
        return math.fsum(number(line.get(key)) or 0.0 for line in self.metrics)

    @property
    def epsilon(self) -> float | None:
        """The privacy spent so far; None without privacy or before the first round."""
        return number(self.metrics[-1].get("epsilon")) if self.metrics else None

    @property
    def budget(self) -> float | None:
        """The epsilon that the run may spend; None where there is no privacy, or noise alone is given."""
        settings = self.config.get("privacy")
        return number(settings.get("epsilon")) if isinstance(settings, dict) else None

    @property
    def virtual_seconds(self) -> float | None:
        """The time on the clock of simulated clients; None where there is no such clock."""
        return number(self.metrics[-1].get("virtual_seconds")) if self.metrics else None

    def named(self, status: str) -> list[str]:
        """The clients of the last round whose status is "ok", "dropped" or "away", by their names."""
        lines = (line for line in self.clients if line.get("status") == status)
        return [str(line.get("name") or f"client {line['client']}") for line in lines]

    @property
    def away(self) -> list[str]:
        """The clients that were not connected when the last round began."""
        return [*map(str, self.metrics[-1].get("away", []))] if self.metrics else []

    @property
    def warnings(self) -> list[str]:
        """What looks wrong in the files, a sentence each."""
        found = []
        for line in self.clients:
            if line.get("status") == "dropped":
                who = line.get("name") or f"client {line['client']}"
                found.append(f"round {self.done}: {who} dropped: {line.get('reason')}")
        needed = int(number(self.config.get("min_updates")) or 1)
        few = [str(line["round"]) for line in self.metrics if line["clients"] < needed]
        if few:
            found.append(f"rounds with fewer than {needed} good updates: {', '.join(few[-5:])}")
        if self.metrics and self.metrics[-1].get("epsilon_valid") is False:
            found.append("epsilon is not valid: the noise can be repeated")
        kept = [value for line in self.metrics if (value := number(line.get("tail_kept"))) is not None]
        if kept and (middle := statistics.median(kept)) < KEPT:
            found.append(
                f"rank collapse: a round keeps {max(middle, 0):.0%} of ΔW beyond the clients' smallest rank"
            )
        one = self.round_seconds
        if self.stage == "running" and one is not None and self.waited > max(LONG, SLOW * one):
            found.append(
                f"round {self.done + 1} has taken {self.waited:.0f} s, and one took {one:.1f} s before; it "
                "may wait for a client"
            )
        return found


def read_progress(path: str | Path) -> Progress:
    """How far a run is.

    Raises:
        CheckpointError: the folder holds no run, or a file of it is broken.
    """
    path = Path(path)
    at_work = held(path)  # before the summary, which a run writes before it lets go of its folder
    failed = (path / ERROR).is_file() and not at_work
    why = (path / ERROR).read_text(encoding="utf-8").partition("\n")[0] if failed else ""
    if not (path / "config.yaml").is_file():
        if failed:  # before the run had begun
            return Progress(path, "failed", why=why)
        raise CheckpointError(
            f"{path}: expected the folder of a run or of several, found no config.yaml; a run makes its "
            "folder once its model and rows are loaded"
        )
    log = path / "metrics.jsonl"
    lines = read_lines(log) if log.is_file() else []
    finished = (path / "summary.json").is_file()
    note = read_object(path / DEPLOYED) if (path / DEPLOYED).is_file() else {}
    stage: Stage = "died" if at_work is False else "running"
    if finished:
        stage = "finished"
    elif failed:
        stage = "failed"
    elif "superlink" in note and not at_work:
        stage, why = "elsewhere", f"run {note.get('run')} on SuperLink {note['superlink']}"
    since = (log if log.is_file() else path / "config.yaml").stat().st_mtime
    return Progress(
        path,
        stage,
        read_config(path / "config.yaml"),
        lines,
        _last_round(path / "clients.jsonl", int(lines[-1]["round"])) if lines else [],
        read_object(path / "summary.json") if finished else {},
        max(0.0, time.time() - since),
        why,
    )


def read_all(path: str | Path) -> tuple[list[Progress], list[str]]:
    """How far every run in a folder is, in the order of their names, and the jobs that have not begun.

    Args:
        path: the folder of a run, of a sweep, or one in which runs lie side by side.

    Raises:
        CheckpointError: there is no run.
    """
    folder, jobs = Path(path), list[str]()
    if (folder / "config.yaml").is_file():
        return [read_progress(folder)], []
    if (folder / SWEEP).is_file():
        jobs = [str(job) for job in read_object(folder / SWEEP).get("jobs") or []]
    places = {*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml"), *folder.glob(f"*/{ERROR}")}
    found = sorted({place.parent for place in places}, key=lambda place: natural(str(place)))
    waiting = [job for job in jobs if folder / job not in found]
    if not found and not waiting:
        return [read_progress(folder)], []  # says what was expected
    return [read_progress(place) for place in found], waiting


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A curve in one line of text: the lowest value is a low bar, the highest a high one.

    Args:
        values: in their order.
        width: characters at most; a character is the last value of an equal share of them.
    """
    count = min(width, len(values))
    shown = [values[(at + 1) * len(values) // count - 1] for at in range(count)]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    step = (high - low) / (len(BARS) - 1)
    return "".join(BARS[round((value - low) / step) if step else 0] for value in shown)


def _last_round(path: Path, round: int) -> list[dict[str, Any]]:
    """The lines of a round at the end of clients.jsonl, which may be too long to be read whole."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        end, size = file.seek(0, 2), BLOCK
        while True:
            at = max(0, end - size)
            file.seek(at)
            whole, _, _ = file.read().rpartition(b"\n")  # what follows is being written
            lines = whole.split(b"\n")[1 if at else 0 :]
            if not at or (lines and json.loads(lines[0])["round"] < round):
                break
            size *= 4
    found = (json.loads(line) for line in lines if line)
    return [line for line in found if line["round"] == round]
