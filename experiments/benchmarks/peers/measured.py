"""One run of one system: its rounds' ends, its end, and the peak memory of all its processes together."""

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROUND = re.compile(r"round (\d+)/\d+")
EVERY = 0.2  # seconds between looks at the memory


@dataclass(frozen=True)
class Run:
    """What was measured, in seconds since just before the process was started.

    Args:
        ends: of the rounds.
        whole: when the process had ended.
        peak_mb: the largest sum of the processes' proportional set sizes.
        looking: the share of a core that looking at the memory took.
    """

    ends: list[float]
    whole: float
    peak_mb: float
    looking: float

    @property
    def rounds(self) -> list[float]:
        """Seconds of round 2, 3, and so on."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


@dataclass
class Watch(threading.Thread):
    """Sums the PSS of a process and all that it ever started, as long as they live."""

    root: psutil.Process
    peak: int = 0
    spent: float = 0.0
    seen: set[psutil.Process] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        """Look until told to stop."""
        while not self.done.wait(EVERY):
            began = time.thread_time()
            self.peak = max(self.peak, self.look())
            self.spent += time.thread_time() - began

    def look(self) -> int:
        """The bytes now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= {self.root, *self.root.children(recursive=True)}
        return sum(map(_pss, self.seen))

    def end(self) -> None:
        """Stop looking, and end whatever the system left behind."""
        self.done.set()
        self.join()
        left = [process for process in self.seen if process.is_running()]
        for process in left:
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        for process in psutil.wait_procs(left, timeout=5)[1]:
            process.kill()


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def measure(command: Sequence[str], more: Mapping[str, str], log: Path, rounds: int) -> Run:
    """Run a system to its end.

    Args:
        command: how to start it. It says `round 2/4` on a line when a round has ended.
        more: its environment, beyond what all have.
        log: where what it says goes; it works in that folder.
        rounds: how many it must tell of.

    Raises:
        RuntimeError: it failed, or told of other rounds.
    """
    ends: list[float] = []
    with log.open("w") as file:
        began = time.time()
        process = subprocess.Popen(
            command, cwd=log.parent, env=environment(more), stdout=subprocess.PIPE, stderr=file, text=True
        )
        assert process.stdout is not None
        watch = Watch(psutil.Process(process.pid))
        watch.start()
        try:
            for line in process.stdout:
                if ROUND.match(line):
                    ends.append(time.time() - began)
                file.write(line)
            process.wait()
            whole = time.time() - began
        finally:
            watch.end()
    if process.returncode or len(ends) != rounds:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"exit code {process.returncode}, {len(ends)} of {rounds} rounds:\n{tail}")
    return Run(ends, whole, watch.peak / 2**20, watch.spent / whole)


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """What every process is told: no network, all cores unless `more` says otherwise, nothing held back."""
    own = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    own |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    own |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return own | dict(more)
