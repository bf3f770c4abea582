"""A real federation in network namespaces: a server and three sites with addresses of their own, over TLS.

    make network      (as root; needs iproute2, nginx and curl; 20 minutes or so; prints tables)

The packaged MiniLM on TREC questions, ranks 2, 4 and 8, each site's rows in a file of its own under its own
column names, SuperNodes through the proxy of `fedlora deploy init`. Then the same while a link is cut, a site
is killed, and the SuperLink is killed; and what must be refused.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from trial import BIN, Trial

SITES = {"north": 2, "middle": 4, "south": 8}
ADDRESS = {"server": "10.77.0.1", "north": "10.77.0.11", "middle": "10.77.0.12", "south": "10.77.0.13"}
MODEL = ("model=minilm", "clients=3", "ranks=[2,4,8]", "strategy=flexlora", "client.steps=10")
TREC = ("data=trec", "data.partition=dirichlet", "data.alpha=1.0", "data.max_rows=240")
COLUMNS = {"north": ("question", "topic"), "middle": ("text", "label"), "south": ("frage", "thema")}
ROUNDS = 5


def ip(*words: str) -> None:
    """One call of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def within(host: str) -> list[str]:
    """What goes before a command that runs on a host."""
    return ["ip", "netns", "exec", f"fedlora-{host}"]


@contextmanager
def network() -> Iterator[None]:
    """A switch, and a host on it for the server and for every site."""
    names = ["switch", *ADDRESS]
    for name in names:
        subprocess.run(["ip", "netns", "del", f"fedlora-{name}"], capture_output=True)
    try:
        ip("netns", "add", "fedlora-switch")
        ip("-n", "fedlora-switch", "link", "add", "br0", "type", "bridge")
        ip("-n", "fedlora-switch", "link", "set", "br0", "up")
        for name, address in ADDRESS.items():
            space = f"fedlora-{name}"
            ip("netns", "add", space)
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                space,
                "type",
                "veth",
                "peer",
                f"to-{name}",
                "netns",
                "fedlora-switch",
            )
            ip("-n", "fedlora-switch", "link", "set", f"to-{name}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", f"fedlora-{name}"], capture_output=True)


def wire(host: str) -> tuple[int, int]:
    """Bytes that a host has received and sent so far, headers of Ethernet, IP, TCP and TLS included."""
    shown = subprocess.run(
        ["ip", "-n", f"fedlora-{host}", "-s", "-j", "link", "show", "eth0"], capture_output=True, check=True
    )
    counted = json.loads(shown.stdout)[0]["stats64"]
    return counted["rx"]["bytes"], counted["tx"]["bytes"]


def files(folder: Path) -> None:
    """Each site's rows, in the order that one process would have them, and the server's test rows."""
    from fedlora.config.composition import compose
    from fedlora.config.translate import run_spec
    from fedlora.runner.load_data import load_dataset, partition_rows

    config = compose([*MODEL, *TREC])
    spec = run_spec(config)
    dataset = load_dataset(spec)
    parts = zip(SITES, partition_rows(spec.data, dataset, spec.clients, spec.seed), strict=True)
    rows = {site: [dataset.train[i] for i in part.rows] for site, part in parts} | {"test": dataset.test}
    for name, found in rows.items():
        text, label = COLUMNS.get(name, ("text", "label"))
        records = [json.dumps({text: row.source, label: row.target}) for row in found]
        (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one of a run's logs."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


class Tried:
    """The runs of one federation, each while something happens to it."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self._trial, self._folder = trial, folder
        test = folder / "test.jsonl"
        data = ("data=sites", f"data.test={test}", "data.text=text", "data.label=label")
        self._job = ("engine=deploy", "engine.superlink=fedlora", *MODEL, *data)

    def __call__(
        self, name: str, *overrides: str, happens: Callable[[], None] | None = None, rounds: int = ROUNDS
    ) -> Path:
        """Run it; `happens` is called, beside it, once round 1 is over."""
        out, beside = self._folder / "runs" / name, []
        counted = {host: [wire(host)] for host in SITES}
        with self._trial.running("run", *self._job, f"rounds={rounds}", *overrides, f"out={out}") as process:
            for line in process.stdout or []:
                print("   ", line, end="", flush=True)
                if line.startswith("round "):
                    for host in SITES:
                        counted[host].append(wire(host))
                if line.startswith("round 1/") and happens:
                    beside.append(threading.Thread(target=happens))
                    beside[0].start()
            said = process.stderr.read() if process.stderr else ""
        for thread in beside:
            thread.join()
        if process.returncode:
            print(said)
            raise SystemExit(f"{name}: the run failed")
        (out / "wire.json").write_text(json.dumps(counted))
        return out

    @property
    def trial(self) -> Trial:
        """The federation."""
        return self._trial


def said_of(name: str, out: Path) -> str:
    """A run's line of the table."""
    metrics, clients = lines(out, "metrics.jsonl"), lines(out, "clients.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    seconds = [line["seconds"] for line in metrics]
    dropped = sorted({f"{c['client']}: {c['reason'][:60]}" for c in clients if c["status"] != "ok"})
    return (
        f"| {name} | {len(metrics)} | {seconds[0]:.1f} | {median(seconds[1:]):.1f} | {max(seconds):.1f} | "
        f"{sum(line['dropped'] for line in metrics)} | {'; '.join(dropped) or '-'} | "
        f"{summary['accuracy']:.3f} | {summary['adapter_sha256'][:12]} |"
    )


def bytes_of(out: Path) -> list[str]:
    """Bytes by the messages' own sizes, and on the wire, by site, in the rounds after the first."""
    counted = json.loads((out / "wire.json").read_text())
    clients, table = lines(out, "clients.jsonl"), []
    for number, (site, rank) in enumerate(SITES.items()):
        own = [line for line in clients if line["client"] == number and line["round"] > 1]
        down, up = (sum(line[f"bytes_{way}"] for line in own) / len(own) for way in ("down", "up"))
        first, last = counted[site][1], counted[site][-1]
        seen = [(last[i] - first[i]) / len(own) for i in (0, 1)]
        numbers = " | ".join(f"{number / 1e3:.1f}" for number in (down, seen[0], up, seen[1]))
        table.append(f"| {site} | {rank} | {numbers} |")
    return table


def refusals(trial: Trial) -> list[str]:
    """What must not work, and what came of it."""
    public, found = f"{ADDRESS['server']}:8443", []
    here = trial.folder / "sites" / "north"
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1/fleet/../control/list-runs"):
        words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--path-as-is", "-X", "POST",
                 "-H", "Content-Type: application/protobuf", "--cacert", str(here / "ca.crt"), f"https://{public}{path}"]  # fmt: skip  # noqa: E501
        done = subprocess.run([*within("north"), *words], capture_output=True, text=True)
        found.append(f"| a site asks for {path} | {done.stdout} |")
    plain = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{public}/v1/fleet/pull-messages"]
    done = subprocess.run([*within("north"), *plain], capture_output=True, text=True)
    found.append(f"| plain HTTP | {done.stdout} |")
    closed = ["curl", "-s", "-m", "5", "-k", f"https://{ADDRESS['server']}:8444/health"]
    done = subprocess.run([*within("north"), *closed], capture_output=True, text=True)
    found.append(
        f"| the SuperLink's own port, from a site | curl exit {done.returncode} (7: no connection) |"
    )
    with tempfile.TemporaryDirectory() as folder:
        stranger, other = Path(folder) / "key", Path(folder) / "other"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(stranger)], check=True
        )
        subprocess.run(
            [str(BIN / "fedlora"), "deploy", "init", str(other), "--sites", "1"],
            check=True,
            capture_output=True,
        )
        for what, root, key in (
            ("a key that is not registered", here / "ca.crt", stranger),
            (
                "a server that another authority has signed",
                other / "sites" / "site-0" / "ca.crt",
                here / "node.key",
            ),
        ):
            words = [str(BIN / "flower-supernode"), "--superlink", public, "--root-certificates", str(root),
                     "--auth-supernode-private-key", str(key), "--max-retries", "1",
                     "--port", "9199"]  # fmt: skip
            with (Path(folder) / "said").open("w+") as said:  # no pipe: children may hold one open
                done = subprocess.run(
                    [*within("north"), "timeout", "40", *words],
                    stdout=said, stderr=said, env={**trial.environment, "PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
                said.seek(0)
                why = [line.strip() for line in said if "code:" in line or "Failed" in line][-1:]
            found.append(f"| {what} | exit {done.returncode}: {' '.join(why)} |")
    return found


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for all that it writes")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="fedlora-network-"))
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    files(folder)
    with network():
        trial = Trial(folder / "federation", SITES, ADDRESS["server"], within, port=8443)
        for site in SITES:
            trial.set(site, "data", json.dumps(str(folder / f"{site}.jsonl")))
            trial.set(site, "text", json.dumps(COLUMNS[site][0]))
            trial.set(site, "label", json.dumps(COLUMNS[site][1]))
        with trial:
            measure(trial, folder)


def measure(trial: Trial, folder: Path) -> None:
    """Run everything and print what was seen."""
    tried = Tried(trial, folder)

    def cut() -> None:
        ip("-n", "fedlora-switch", "link", "set", "to-south", "down")
        time.sleep(90)
        ip("-n", "fedlora-switch", "link", "set", "to-south", "up")

    def kill_site() -> None:
        trial.kill("middle", signal.SIGKILL)
        time.sleep(75)  # the SuperLink takes a node for gone after 60 s, and its key back only then
        trial.start("middle")

    def kill_link() -> None:
        trial.kill("superlink", signal.SIGKILL)
        time.sleep(15)
        trial.start("superlink")

    print(trial.fedlora("deploy", "check", "--public", f"{ADDRESS['server']}:8443", *tried._job[1:]))
    table = [said_of("nothing happens", plain := tried("plain"))]
    trial.fedlora("run", *MODEL, *TREC, "engine.fuse=1", f"rounds={ROUNDS}", f"out={folder / 'runs' / 'one'}")
    table.append(said_of("one process, `engine.fuse=1`", folder / "runs" / "one"))
    table.append(said_of("a link cut for 90 s", tried("cut", happens=cut, rounds=12)))
    table.append(said_of("a site killed, back after 75 s", tried("killed", happens=kill_site, rounds=12)))
    table.append(said_of("the SuperLink killed, back after 15 s", tried("link", happens=kill_link)))
    for site in SITES:
        trial.kill(site, signal.SIGTERM)
        trial.set(site, "warm", "false")
    time.sleep(5)
    for site in SITES:
        trial.start(site)
    table.append(said_of("`warm = false`: a model loaded for every message", tried("cold", rounds=3)))
    heads = (
        "what",
        "rounds",
        "first s",
        "median s",
        "longest s",
        "dropped",
        "who and why",
        "accuracy",
        "adapter",
    )
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    print("\n".join(table))
    heads = ("site", "rank", "kB down by messages", "on the wire", "kB up by messages", "on the wire")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    print("\n".join(bytes_of(plain)))
    print("\n| what must not work | what came |\n|---|---|")
    print("\n".join(refusals(trial)))


if __name__ == "__main__":
    sys.exit(main())
