"""Peak memory of runs of 4, 20 and 100 clients on the default model, 16 rows each, two rounds.

python experiments/benchmarks/memory.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run, read the summaries, print."""
    with tempfile.TemporaryDirectory() as where:
        for clients in (4, 20, 100):
            out = Path(where) / str(clients)
            settings = [
                f"clients={clients}",
                "rounds=2",
                "data.partition=iid",
                "data.max_rows=16",
                f"out={out}",
            ]
            command = [sys.executable, "-m", "fedlora.cli.main", "run", "evaluate.every=0", *settings]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((out / "summary.json").read_text())
            print(f"{clients:4} clients: peak {summary['peak_memory_mb']} MB", flush=True)


if __name__ == "__main__":
    main()
