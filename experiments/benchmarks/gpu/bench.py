"""What all sections share: the device, the time that is left, the large model in memory, taking turns."""

import gc
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.models import Base, MultiAdapterModel
from fedlora.training.evaluation import evaluate

from .report import Report
from .shapes import LLAMAS, TINY, llama_base, start

RANK = 16
GRACE = 10.0  # seconds after its end at which a section is broken off, if it has not seen the clock itself


@dataclass
class Bench:
    """What all sections share.

    Args:
        device: "cuda" or "cpu".
        tiny: whether the large models have tiny shapes.
        report: where all that is found goes.
        peak: bf16 FLOP/s of a large matrix product, as the first section has measured it; 0 before.
        until: when the section that is under way is to end, on the clock of `time.monotonic`.
    """

    device: str
    tiny: bool
    report: Report
    peak: float = 0.0
    until: float = 0.0
    _held: dict[str, tuple[Base, Adapter]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU, so that speed and memory can be judged."""
        return self.device == "cuda"

    @property
    def judged(self) -> bool:
        """Whether goals of speed and memory can be judged: a GPU, and models of their real size."""
        return self.on_gpu and not self.tiny

    @cached_property
    def dtype(self) -> torch.dtype:
        """The large models' precision: bfloat16, but float32 on a CPU, where equal work can be seen."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def model(self, name: str) -> tuple[Base, Adapter]:
        """A large model and the adapter that its clients start from; the one before it is let go.

        Args:
            name: "1B" or "8B".
        """
        if name not in self._held:
            self._held.clear()
            self.free()
            base = llama_base((TINY if self.tiny else LLAMAS)[name], self.device, self.dtype)
            self._held[name] = (base, start(base, RANK))
            self.report.note(f"{name}: {way(*self._held[name])}")
        return self._held[name]

    @property
    def left(self) -> float:
        """Seconds that the section has left."""
        return self.until - time.monotonic()

    def wait(self) -> None:
        """Let the device finish."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory that nobody uses back to the device."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measure(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of a run until the device has finished, and the peak of its memory in GB (1e9 bytes)."""
        self.wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run()
        self.wait()
        seconds = time.perf_counter() - began
        return seconds, torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else 0.0

    def take_turns(self, runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, "Measured"]:
        """Run each once to warm up, then all of them in turn, in an order that changes from turn to turn.

        A turn is left out where the section's time does not suffice for it, but never the first.

        Args:
            runs: by name.
            repeats: turns at most.
        """
        took = sum([self.measure(run)[0] for run in runs.values()])
        found: dict[str, Measured] = {name: Measured() for name in runs}
        for turn in range(repeats):
            if turn and self.left < took:
                break
            began = time.monotonic()
            for name in [*runs][:: -1 if turn % 2 else 1]:
                seconds, peak = self.measure(runs[name])
                found[name].seconds.append(seconds)
                found[name].peak = max(found[name].peak, peak)
            took = time.monotonic() - began
        return found


@dataclass
class Measured:
    """The runs of one system.

    Args:
        seconds: of each run.
        peak: GB of memory, the most of all runs.
    """

    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    def rates(self, tokens: int) -> str:
        """Tokens a second as a table has them: by the median, and the least and the most."""
        low, high = tokens / max(self.seconds), tokens / min(self.seconds)
        return f"{tokens / self.median:,.0f} ({low:,.0f} to {high:,.0f})"


class TimeUp(Exception):
    """A section has run for longer than it may."""


@contextmanager
def broken_off(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside the block when so many seconds have passed; for the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeUp(f"broken off after {seconds:.0f} s, which is more than its share of the minutes")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def way(base: Base, adapter: Adapter) -> str:
    """How fedlora feeds a model: packed or padded rows, and the operations that attend, as they were seen.

    Args:
        base: the model.
        adapter: one of its clients'.
    """
    rows = [base.task.probe([*range(2, 2 + size)], at) for at, size in enumerate((9, 5, 7))]
    with MultiAdapterModel(base, [Task(adapter)]) as bank:
        fed = "packed rows" if bank.unpadded else "padded rows"
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        evaluate(base, [Task(adapter)], [rows])
    names = {
        one.key.partition("::")[2] for one in seen.key_averages() if re.search("attention|varlen", one.key)
    }
    inner = sorted(name for name in names if name.startswith("_")) or sorted(names)
    peculiar = [line.partition("' ")[2] for line in base.traits.notices(base.path)]
    return ", ".join([fed, *inner, *peculiar])
