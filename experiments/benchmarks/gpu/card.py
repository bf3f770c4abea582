"""The card: what it is, what runs on it, and what it can do at most."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from .bench import Bench

PACKAGES = ("torch", "transformers", "peft", "flwr", "ray", "opacus", "triton", "flash-attn")


def card(bench: Bench) -> None:
    """Section 0: the card, versions, the peak of a bf16 matrix product, and copy bandwidth."""
    report = bench.report
    named = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    if bench.on_gpu:
        about = torch.cuda.get_device_properties(0)
        named |= {"CUDA": str(torch.version.cuda), "card": about.name}
        named |= {
            "memory": f"{about.total_memory / 1e9:.1f} GB",
            "processors": str(about.multi_processor_count),
        }
    else:
        named["card"] = f"none: {platform.machine()}, {torch.get_num_threads()} threads"
    size = 8192 if bench.on_gpu else 256
    bench.peak = product(bench, size)
    bandwidth = copied(bench, 2**32 if bench.on_gpu else 2**24)
    table = report.table("The machine", ["what", "value"])
    for name, value in named.items():
        table.row(name, value)
    table.row(f"bf16 product of {size} x {size} x {size}, TFLOP/s", bench.peak / 1e12)
    table.row("copy on the device, bytes read and written, TB/s", bandwidth / 1e12)


def product(bench: Bench, size: int) -> float:
    """FLOP/s of bfloat16 matrix products of random numbers: the best of five windows."""
    left, right = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    return 2.0 * size**3 / _least(bench, lambda: torch.mm(left, right, out=out))


def copied(bench: Bench, size: int) -> float:
    """Bytes a second of a copy of `size` bytes, reading and writing counted."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2.0 * size / _least(bench, lambda: target.copy_(source))


def _least(bench: Bench, work: object) -> float:
    """Seconds of one call, in the best of five windows of ten."""
    assert callable(work)
    best = float("inf")
    for _ in range(6):  # the first warms up
        bench.wait()
        began = time.perf_counter()
        for _ in range(10):
            work()
        bench.wait()
        best = min(best, (time.perf_counter() - began) / 10)
    return best


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
