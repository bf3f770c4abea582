"""`fedlora deploy check`: look a running federation over before the first round."""

import os
import ssl
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import fedlora
from fedlora.deploy.known_sites import registered
from fedlora.deploy.superlink import heard, nodes_of, submit, superlink_of
from fedlora.errors import ConfigError, FedLoraError

APART, TOO_FAR = 60.0, 300.0  # seconds between two clocks: to mention, and what Flower refuses
ROOM = 500  # MB that a site should have left beside what it has loaded
COLUMNS = ("site", "client", "rank", "rows", "fedlora", "torch", "device", "free_mb", "clock")
CONTROL, RUNTIME = "/v1/control/list-runs", "/v1/runtime/acquire-task"


def check(config: DictConfig, public: str | None, console: Console) -> None:
    """Meet every site, without a round, and look at what is open.

    Args:
        config: of the run that is meant.
        public: HOST:PORT that sites call, to see whether more than the fleet path answers there.
        console: where to say it.

    Raises:
        FedLoraError: something is wrong; each finding is said before.
    """
    superlink = superlink_of(config)
    connection = connection_of(superlink)
    found = list[str]()

    def find(finding: str) -> None:
        found.append(finding)
        console.print(f"- {finding}", style="yellow", soft_wrap=True, markup=False, highlight=False)

    config.engine.experiment = "check"
    with ThreadPoolExecutor(1) as beside:  # each of Flower's commands takes a second to begin
        sent = beside.submit(submit, config, "check", superlink)
        for finding in [*open_paths(connection, public), *_offline(superlink)]:
            find(finding)
        run = sent.result()
    console.print("asking the sites about their settings and rows, then about the model", style="dim")
    sites, attendance = _asked(run, superlink, find)
    console.print(_table(sites))
    if attendance[0] < attendance[1]:
        away = f", without {', '.join(attendance[2])}" if attendance[2] else ""
        find(f"{attendance[0]} of {attendance[1]} sites can take part{away}")
    for finding in [finding for site in sites for finding in _look(site)]:
        find(finding)
    if found:
        raise FedLoraError(f"{len(found)} finding{'s' * (len(found) > 1)}, above")
    console.print("nothing found: same versions and model everywhere, clocks agree, memory enough")


def _offline(superlink: str) -> list[str]:
    """Sites that are registered and not connected, by name."""
    names = registered()
    return [
        f"{name} is registered and not connected; start its supernode.sh, whose output says what is wrong"
        for node, status in nodes_of(superlink).items()
        if status in ("registered", "offline") and (name := names.get(node))
    ]


def _asked(run: int, superlink: str, find: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[Any]]:
    """What every site says of itself; how many can take part, of how many, and who is away.

    Args:
        run: Flower's number of the check.
        superlink: by its name in Flower's configuration.
        find: takes a line about every site that cannot take part, as it comes.

    Raises:
        FedLoraError: the server could not ask, or no site can take part.
    """
    from fedlora.callbacks.base import Callbacks, RunHandle
    from fedlora.callbacks.remote import ProgressReceiver

    listener, quiet = ProgressReceiver(Path()), Callbacks(RunHandle(rounds=0))
    sites: list[dict[str, Any]] = []
    with closing(heard(superlink, run)) as lines:
        for line in lines:
            if (said := listener.hear(line, quiet)) is None:
                continue
            what, values = said
            if what == "site":
                sites.append(values[0])
            elif what == "refused":
                find(str(values[0]))
            elif what == "error":
                raise FedLoraError(str(values[0]))
            elif what == "done":
                return sites, values
    raise FedLoraError(f"the server stopped; its log: flwr log {run} {superlink} --show")


def connection_of(superlink: str) -> dict[str, Any]:
    """What Flower's configuration says of a SuperLink."""
    file = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "config.toml"
    try:
        found = tomllib.loads(file.read_text("utf-8"))["superlink"][superlink]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"engine.superlink: expected '{superlink}' in {file}, where Flower looks for it; say . "
            f"DIR/server/env.sh, DIR being what `fedlora deploy init` wrote ({type(error).__name__})"
        ) from error
    return dict(found)


def open_paths(connection: dict[str, Any], public: str | None) -> list[str]:
    """What answers that should not: plain HTTP, and control or runtime where sites call."""
    address, found = str(connection.get("address", "")), []
    if connection.get("insecure"):
        found.append(f"plain HTTP to {address}: whoever is on the way reads and changes everything; use TLS")
    host = address.rpartition(":")[0].strip("[]")
    if public is None:
        if host not in ("localhost", "::1") and not host.startswith("127."):
            found.append(
                f"the control path is used over the network, at {address}: whoever reaches it runs code on "
                "the server and at every site; keep it to this machine or a VPN, with a proxy that shows "
                "sites /v1/fleet/ alone"
            )
        return found
    for path, what in (
        (CONTROL, "start runs, which is code at every site"),
        (RUNTIME, "take tasks of a run"),
    ):
        code = _answer(f"https://{public}{path}", connection.get("root-certificates"))
        if code is None:
            found.append(f"{public} does not answer over TLS by this deployment's certificates")
            break
        if code not in (401, 403, 404):
            found.append(
                f"{public}{path} answers {code}: whoever reaches it can {what}; expose /v1/fleet/ alone"
            )
    return found


def _answer(url: str, roots: Any) -> int | None:
    """The status that a path answers with; None without an answer over TLS."""
    trusted = ssl.create_default_context(cafile=None if roots is None else str(roots))
    asked = urllib.request.Request(url, b"", {"Content-Type": "application/protobuf"}, method="POST")
    try:
        with urllib.request.urlopen(asked, timeout=10, context=trusted) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _look(site: dict[str, Any]) -> list[str]:
    """What is wrong with what a site says of itself."""
    who, found = site["name"], list[str]()
    if site["fedlora"] != fedlora.__version__:
        found.append(f"{who} has fedlora {site['fedlora']}, this machine {fedlora.__version__}")
    if abs(site["ahead"]) > APART:
        end = "Flower refuses its signatures beyond 300 s" if abs(site["ahead"]) > TOO_FAR else "set it right"
        found.append(f"{who}: its clock is {site['ahead']:+.0f} s off the server's; {end}")
    if site["free_mb"] < ROOM:
        found.append(f"{who} has {site['free_mb']} MB of memory left with the model loaded, expected {ROOM}")
    if site["torch"] != site["server_torch"]:
        found.append(
            f"{who} has torch {site['torch']}, the server {site['server_torch']}: results may differ"
        )
    return found


def _table(sites: list[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS, box=None, padding=(0, 2, 0, 0))
    for site in sorted(sites, key=lambda found: int(found["client"])):
        cells = site | {"site": site["name"], "clock": f"{site['ahead']:+.0f} s"}
        table.add_row(*(str(cells.get(name, "-")) for name in COLUMNS))
    return table
