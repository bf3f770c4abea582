"""kill -9 at random instants: does a resumed run end in the adapter of the one that nothing interrupted?

    python experiments/studies/crash/make.py [--kills 20] [--seed 0]

Every run is a process of its own on the tiny model. It is killed in a round that is drawn, or after the last,
at an instant that is drawn too, and resumed; every fourth is killed again while it is resumed. A run that had
written its summary by then is compared as it is. Three jobs take turns: mixed ranks; clients with parts of
their own; noise, which a test seed repeats, with room for rounds that are done, and so paid, twice.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROUNDS = 6
SMALL = ["model=tiny", "data=tiny", "clients=3", f"rounds={ROUNDS}", "client.steps=6", "+data.source.rows=48"]
NOISE = ["privacy=dp_sgd", "privacy.insecure_test_seed=1", "privacy.participations=10"]
JOBS = {
    "flexlora, ranks 2 and 4": ["strategy=flexlora", "ranks=[2,4]", "clients_per_round=2"],
    "fedms": ["strategy=fedms", "ranks=4"],
    "fedit under dp_sgd": ["strategy=fedit", "ranks=4", *NOISE],
}


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """A `fedlora run` of its own."""
    command = [sys.executable, "-m", "fedlora.cli.main", "run", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(words: list[str]) -> None:
    """Run to the end."""
    process = start(words)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"fedlora run {' '.join(words)} ended with {process.returncode}: {said.decode()}")


def kill(words: list[str], out: Path, rounds: int, after: float) -> bool:
    """Whether a run was still alive so long after its n-th round was told, and is no more."""
    process, before = start(words), stamp(out)
    while process.poll() is None and (stamp(out) == before or rounds_logged(out) < rounds):
        time.sleep(0.001)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return not (out / "report.html").exists()


def stamp(out: Path) -> int:
    """When a run was begun or continued: its settings are written then."""
    return (out / "config.yaml").stat().st_mtime_ns if (out / "config.yaml").exists() else 0


def rounds_logged(out: Path) -> int:
    """How many rounds are in the log."""
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0


def state(out: Path) -> str:
    """How far a run came."""
    points = [file.stem[-2:] for file in (out / "checkpoint").glob("round-*.safetensors")]
    left = [file.name for file in out.rglob("*.tmp")]
    end = ["summary written"] if (out / "summary.json").exists() else []
    return ", ".join(
        [f"{rounds_logged(out)} rounds told", f"checkpoint {max(points, default='none')}", *end, *left]
    )


def result(out: Path) -> tuple[str | None, str]:
    """What must be equal: the adapter's hash, which a personal strategy lacks, and that of the last state."""
    last, digest = f"round-{ROUNDS:06d}.safetensors", hashlib.sha256()
    for name, tensor in sorted(load_file(out / "checkpoint" / last).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for file in sorted((out / "checkpoint" / "clients").rglob(last)):
        digest.update(file.parent.name.encode() + file.read_bytes())
    return json.loads((out / "summary.json").read_text())["adapter_sha256"], digest.hexdigest()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    equal, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as where:
        whole, seconds = {}, {}
        for number, (name, job) in enumerate(JOBS.items()):
            out = Path(where) / f"whole-{number}"
            finish([*SMALL, *job, f"out={out}"])
            whole[name] = result(out)
            lines = (out / "metrics.jsonl").read_text().splitlines()
            seconds[name] = statistics.median(json.loads(line)["seconds"] for line in lines)
        print("| job | killed at | again at | result |\n|---|---|---|---|")
        for number in range(given.kills):
            name = list(JOBS)[number % len(JOBS)]
            out, again = Path(where) / f"run-{number}", ""

            def hit(words: list[str], done: int, out: Path = out, round: float = seconds[name]) -> bool:
                return kill(words, out, draw.randint(done, ROUNDS), draw.uniform(0, round))

            while not hit([*SMALL, *JOBS[name], f"out={out}"], 0):  # it was done before: draw again
                shutil.rmtree(out)
            first = state(out)
            if (
                number % 4 == 3
                and not (out / "summary.json").exists()
                and hit([f"resume={out}"], rounds_logged(out))
            ):
                again = state(out)
            if not (out / "summary.json").exists():
                finish([f"resume={out}"])
            same = result(out) == whole[name]
            equal += same
            print(f"| {name} | {first} | {again} | {'equal' if same else 'DIFFERS'} |", flush=True)
    print(f"\n{equal} of {given.kills} equal, {time.perf_counter() - began:.0f} s")
    raise SystemExit(equal < given.kills)


if __name__ == "__main__":
    main()
