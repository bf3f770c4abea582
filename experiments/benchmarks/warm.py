"""Thirty short runs as one sweep, and as thirty processes: python experiments/benchmarks/warm.py.

Every run is two rounds of one of five strategies over 4 clients on MiniLM and TREC. What a sweep saves is
the imports, the base and the tokens; that the adapters are the same is checked, too.
"""

import hashlib
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

JOB = ["model=minilm", "data=trec", "clients=4", "ranks=4", "rounds=2", "client.steps=1", "data.test_rows=50"]
SWEPT = {
    "strategy": ("fedit", "ffalora", "flexlora", "flora", "fedexlora"),
    "seed": ("0", "1", "2"),
    "client.lr": ("0.001", "0.004"),
}
RUN = [sys.executable, "-m", "fedlora.cli.main", "run"]


def main() -> None:
    """Run both, print both times."""
    names = [
        f"{a},{b},{c}" for a, b, c in product(*([f"{key}={v}" for v in vs] for key, vs in SWEPT.items()))
    ]
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = Path(folder) / "cold", Path(folder) / "warm"
        began = time.perf_counter()
        for name in names:
            _run([*JOB, *name.split(","), f"out='{cold / name}'"])
        alone = time.perf_counter() - began
        began = time.perf_counter()
        _run(["-m", *JOB, *(f"{key}={','.join(values)}" for key, values in SWEPT.items()), f"out='{warm}'"])
        together = time.perf_counter() - began
        same = all(_sha(cold / name) == _sha(warm / name) for name in names)
    print(f"{len(names)} runs: {alone:.0f} s in processes of their own, {together:.0f} s in one sweep")
    print(f"{alone / together:.1f} times faster; adapters {'the same, byte for byte' if same else 'DIFFER'}")


def _run(words: list[str]) -> None:
    subprocess.run([*RUN, *words], check=True, stdout=subprocess.DEVNULL)


def _sha(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
