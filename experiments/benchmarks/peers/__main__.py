"""How fast and how large fedlora is beside its peers, on one job.

    python -m experiments.benchmarks.peers [--memory] [--to DIR]

The job: MiniLM on TREC, 8 clients of 48 rows, rank 8 on query and value and the classifier, AdamW, gradients
clipped to 1, 4 rounds of one local epoch in batches of 8, no evaluation. fedlora makes it once; all peers
read it, the same tokens in the same batches from the same start, and end in the same adapter up to rounding,
which AdamW amplifies; the largest relative difference of a tensor is in the table. Each system is a process
of its own, and they take turns within a repeat. Measured from just before its start: seconds to the end of
round 1, of a later round (the median), and to the end of the process; and the peak of the summed PSS of all
its processes, looked at every 0.2 s. That all end in the same is seen outside of those times.

- bare: a PEFT loop over the clients, no framework.
- flower-rebuilt: Flower's simulation on Ray, the model made anew for every message, as in its LLM examples.
- flower-cached: the same, the model kept in each actor.
- pfl, pfl-workers: Apple's pfl-research, in one process, and in one of one thread for each core.
- fedlora one by one, fused, bfloat16: `fedlora run strategy=fedit` with `engine.fuse=1`, as it comes, and
  with the base in bfloat16 by `model.dtype=bfloat16` (all others compute in float32).

What was chosen in a peer's favour is in its own file. Peers are also spared work that fedlora does within its
time: reading the texts, tokenising them and dealing them out before round 1; certificate, checkpoint and
records after every round (all before its round counts as ended); the report at the end.

`--memory` also runs every system with 8 and with 24 clients for 2 rounds: memory for one more client.

pfl asks for other versions of packages than we do; it works in a folder of its own:

    pip install --no-deps --target /tmp/pfl pfl==0.6.0 dp-accounting==0.5.1 prv-accountant==0.2.0 \
        "absl-py<2" "dm-tree<0.2" wrapt
    python -m experiments.benchmarks.peers --pfl /tmp/pfl
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from .floor import operations
from .jobfile import Size, written
from .measured import Run, environment, measure
from .shared import Job, State, accuracy
from .tables import Found, goals, slope, table

PROGRAM = "python -m experiments.benchmarks.peers"
ROOT = Path(__file__).parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={os.cpu_count()}"]
Command = Callable[[Size, Path, Path], list[str]]


def _peer(*words: str, launcher: Sequence[str] = ()) -> Command:
    start = [sys.executable, *launcher, "-m", f"experiments.benchmarks.peers.{words[0]}"]
    return lambda size, job, out: [*start, str(job), str(out), *words[1:]]


def _fedlora(*words: str) -> Command:
    run = [sys.executable, "-m", "fedlora.cli.main", "run"]
    return lambda size, job, out: [*run, *size.words(), *words, f"out='{out}'"]


SYSTEMS: dict[str, Command] = {
    "bare": _peer("bare"),
    "flower-rebuilt": _peer("flower_sim"),
    "flower-cached": _peer("flower_sim", "--cached"),
    "pfl": _peer("pfl_sim"),
    "pfl-workers": _peer("pfl_sim", launcher=TORCHRUN),
    "fedlora one by one": _fedlora("engine.fuse=1"),
    "fedlora fused": _fedlora(),
    "fedlora bfloat16": _fedlora("model.dtype=bfloat16"),
}


@dataclass
class Bench:
    """Runs systems, each in a folder of its own; one that fails twice in a turn is left out from then on.

    Args:
        folder: where.
        env: what processes are told beyond the usual.
        names: the systems.
    """

    folder: Path
    env: Mapping[str, str]
    names: list[str]

    def job(self, size: Size) -> tuple[Path, Job]:
        """The job of a size, written down."""
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.folder))
        job = written(size)
        job.write(folder)
        return folder, job

    def turn(self, size: Size, job: Path) -> dict[str, tuple[Run, State]]:
        """Every system once: what was measured, and the adapter that it ended in."""
        found = {}
        for name in list(self.names):
            try:
                done, folder = self.once(name, size, job)
            except RuntimeError as error:
                say(f"{name} failed, and is tried once more: {error}")
                try:
                    done, folder = self.once(name, size, job)
                except RuntimeError:
                    say(f"{name} is left out")
                    self.names.remove(name)
                    continue
            inside = folder / "out" / "adapter" / "adapter_model.safetensors"
            found[name] = done, load_file(inside if inside.exists() else folder / "out")
            rounds = " ".join(f"{seconds:.2f}" for seconds in done.rounds)
            took = f"round 1 at {done.ends[0]:.2f} s, then {rounds}, all {done.whole:.2f} s"
            say(f"{name}, {size.clients} clients: {took}, {done.peak_mb:.0f} MB")
        return found

    def once(self, name: str, size: Size, job: Path) -> tuple[Run, Path]:
        """One run of a system in a new folder."""
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        return measure(
            SYSTEMS[name](size, job, folder / "out"), self.env, folder / "log", size.rounds
        ), folder

    def rates(self) -> dict[str, float]:
        """What the machine can do."""
        command = [sys.executable, "-m", "experiments.benchmarks.peers.floor"]
        said = subprocess.run(command, env=environment(self.env), check=True, capture_output=True, text=True)
        found: dict[str, float] = json.loads(said.stdout)
        return found


def say(text: str) -> None:
    """Progress, beside the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def apart(one: State, other: State) -> float:
    """The largest relative difference of a tensor."""
    if one.keys() != other.keys():
        raise ValueError(f"other tensors: {sorted(one.keys() ^ other.keys())[:4]}")
    return max(float((one[n] - other[n]).norm() / other[n].norm().clamp_min(1e-12)) for n in one)


def there(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The systems whose modules are installed; says what the others lack."""
    lacking = {"flower": ("ray", 'pip install "fedlora[ray]"'), "pfl": ("pfl", f"see the head of {__file__}")}
    found = []
    sys.path += paths
    for name in names:
        module, how = lacking.get(name.split("-")[0], ("torch", ""))
        if find_spec(module) is None:
            say(f"{name} is left out: there is no module {module}; {how}")
        else:
            found.append(name)
    return found


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--memory", action="store_true", help="also measure memory per added client")
    parser.add_argument("--pfl", default="", help="folder into which pfl was installed")
    parser.add_argument("--threads", type=int, help="of torch, where a system does not say; default: its own")
    parser.add_argument("--to", type=Path, help="where to write peers.md and peers.json")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds: at least 2, since later rounds are measured apart from the first")
    return given


def main() -> None:
    """Measure and print."""
    given, load = arguments(), os.getloadavg()[0]
    paths = [given.pfl] if given.pfl else []
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), *paths])}
    if given.threads:
        env["OMP_NUM_THREADS"] = str(given.threads)
    size = Size(given.clients, given.rows, given.batch, given.rounds)
    sizes = [replace(size, clients=clients, rounds=2) for clients in (8, 24)] if given.memory else []
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        bench = Bench(Path(folder), env, there(given.systems, paths))
        place, job = bench.job(size)
        others = [(other, bench.job(other)[0]) for other in sizes]
        rates = bench.rates()
        turns = [bench.turn(size, place) for _ in range(given.repeats)]
        grown = [(s.clients, bench.turn(s, at)) for _ in range(given.repeats) for s, at in others]
    torch.set_num_threads(1)  # of this process, for what is not measured
    found, memory = {}, {}
    for name in bench.names:
        ends = [turn[name][1] for turn in turns]
        far = max(apart(end, turn.get("bare", turn[name])[1]) for end, turn in zip(ends, turns, strict=True))
        memory[name] = {s.clients: [turn[name][0] for n, turn in grown if n == s.clients] for s in sizes}
        runs = [turn[name][0] for turn in turns]
        found[name] = Found.of(runs, far, accuracy(job, ends[-1]), slope(memory[name]))
    work = operations(job) / 1e9
    needed = 3 * sum(value.nbytes for value in job.start.values()) / 2**20
    lines = [*table(found, work, *rates.values()), "", *(f"- {goal}" for goal in goals(found, needed))]
    print("\n".join(lines))
    if given.to is None:
        return
    record = {
        "settings": {"size": asdict(size), "repeats": given.repeats, "fedlora": size.words()},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": given.threads, "load before": load},
        "versions": _versions(),
        "gflops": rates,
        "gflop_a_round": work,
        "client_state_mb": needed,
        "found": {name: asdict(one) for name, one in found.items()},
        "runs": {name: [asdict(turn[name][0]) for turn in turns] for name in found},
        "memory": {
            name: {clients: [asdict(run) for run in runs] for clients, runs in each.items()}
            for name, each in memory.items()
        },
    }
    given.to.mkdir(parents=True, exist_ok=True)
    said = f"`{PROGRAM} {' '.join(sys.argv[1:])}`"
    (given.to / "peers.md").write_text("\n".join([said, "", *lines]) + "\n", encoding="utf-8")
    (given.to / "peers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    """Of what was measured."""
    names = ("torch", "transformers", "peft", "flwr", "ray", "pfl")
    return {"python": platform.python_version()} | {n: version(n) for n in names if find_spec(n)}


def _cpu() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine()
    )


if __name__ == "__main__":
    main()
