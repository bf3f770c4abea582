"""Where the time of one step goes: operations, kernel launches, and the places at which the host waits.

Two rounds are profiled, of one step and of several. What a round does once, such as carrying adapters to the
device, is in both; the difference is what steps alone do.
"""

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .bench import Bench
from .peft_loop import PeftLoop, Work
from .rows import CHAT_1K, ordinary, round_of

CLIENTS = 8
FEW, MANY = 1, 3  # steps of the two rounds
TOP = 25
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",  # item() and the like
)
LAUNCHES = ("LaunchKernel", "cudaMemcpyAsync", "cudaGraphLaunch")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Counts = dict[tuple[str, str], tuple[float, float]]  # kind and name of an operation -> calls, milliseconds


def one_step(bench: Bench) -> None:
    """Section 3: a profile of one step of eight clients at 1B."""
    base, adapter = bench.model("1B")
    clients = CLIENTS if bench.judged else 2
    requests = round_of(base, [adapter] * clients, CHAT_1K, MANY, not bench.on_gpu)
    batches = [ordinary(CHAT_1K, MANY).batches(request) for request in requests]
    loop = PeftLoop(base.model, adapter)
    loop.choose(Work(adapter, batches[0]))

    def ours(steps: int) -> Callable[[], Any]:
        return lambda: ordinary(CHAT_1K, steps).train(base, requests)

    def theirs(steps: int, clients: int) -> Callable[[], Any]:
        return lambda: loop.round([Work(adapter, own[:steps]) for own in batches[:clients]])

    times: dict[str, Callable[[int], Callable[[], Any]]] = {
        "fedlora": ours,
        "PEFT loop": partial(theirs, clients=clients),
    }
    took: dict[str, float] = {}
    for name, run in times.items():
        run(MANY)()  # warms up
        few, many = (bench.measure(run(count))[0] for count in (FEW, MANY))
        took[name] = 1000 * max(0.0, many - few) / (MANY - FEW)
    # A profile of the same for each client would be large: the loop's is of one, and counted for each.
    found = _step(bench, ours)
    one = _step(bench, partial(theirs, clients=1))
    other = {key: (clients * calls, clients * ms) for key, (calls, ms) in one.items()}
    busy = {name: _busy(bench, counts) for name, counts in (("fedlora", found), ("PEFT loop", other))}
    title = f"One step of {clients} clients at 1B, {CHAT_1K.name} each"
    summary = bench.report.table(title, ["a step of all clients", *times])
    summary.row("ms", *took.values())
    summary.row("ms in which the device is busy", *(sum(own.values()) for own in busy.values()))
    for word in (*LAUNCHES, *WAITS):
        summary.row(word, _calls(found, word), _calls(other, word))
    whole = max(1e-9, sum(busy["fedlora"].values()))
    title = f"fedlora: the {TOP} operations of the most time in a step"
    table = bench.report.table(title, ["operation", "calls", "ms", "share"])
    for name, ms in sorted(busy["fedlora"].items(), key=lambda item: -item[1])[:TOP]:
        calls = sum(own[0] for (kind, key), own in found.items() if key == name)
        table.row(name[:90].replace("|", "/"), calls, ms, ms / whole)
    if bench.on_gpu:
        table = bench.report.table(f"fedlora: where the host waits, {MANY} steps", ["place", "times"])
        for place, count in _waits(ours(MANY)).most_common(15):
            table.row(place, count)
    waits = sum(_calls(found, word) for word in WAITS)
    bench.report.goal(2, f"no wait inside a step, found {waits:g}", waits <= 0 if bench.judged else None)


def _step(bench: Bench, run: Callable[[int], Callable[[], Any]]) -> Counts:
    """What a step does: by the difference of a round of many steps and one of few."""
    few, many = (_profiled(bench, run(count)) for count in (FEW, MANY))
    found = {}
    for key, (calls, ms) in many.items():
        before = few.get(key, (0.0, 0.0))
        found[key] = (calls - before[0]) / (MANY - FEW), max(0.0, ms - before[1]) / (MANY - FEW)
    return found


def _profiled(bench: Bench, run: Callable[[], Any]) -> Counts:
    """What a run does, from the trace that the profiler writes: summing it up in Python takes minutes."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=kinds) as found:
        run()
        bench.wait()
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"]
    for event in events:
        if event.get("ph") == "X":
            key = event.get("cat", ""), event["name"]
            calls, ms = sums.get(key, (0.0, 0.0))
            sums[key] = calls + 1, ms + event["dur"] / 1000
    return sums


def _busy(bench: Bench, found: Counts) -> dict[str, float]:
    """Operation -> its ms on the device; on a CPU those of operators, each with what it calls."""
    kinds = ON_DEVICE if bench.on_gpu else ("cpu_op",)
    return {name: ms for (kind, name), (_, ms) in found.items() if kind in kinds and ms > 0}


def _calls(found: Counts, word: str) -> float:
    return sum(calls for (_, name), (calls, _) in found.items() if word in name)


def _waits(run: Callable[[], Any]) -> Counter[str]:
    """How often the host waits for the device, by the line of Python that makes it wait."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in warned if "called a synchroniz" in str(one.message)]
    return Counter(f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in waits)
