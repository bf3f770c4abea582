"""A Ray cluster that is joined or started, and whether its nodes can take a run's actors.

A process is connected to one cluster at a time, and the runs of a sweep share it. A Ray that was started here
ends with this process.
"""

import logging
import math
import os
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedlora.errors import ConfigError

VARIABLE = "RAY_ADDRESS"  # Ray's own; `ray job submit` sets it for what it starts
LOCAL = "local"
ANSWERS = 10.0  # seconds for a cluster's head to answer
LOOKS = 300.0  # seconds for a node to begin a process and say what is installed there
SAME = ("python", "ray", "fedlora", "torch", "transformers")  # what objects of one node need at another

_connected: list[str] = []  # what this module was asked to connect to, or LOCAL, and where that was


@dataclass(frozen=True)
class Node:
    """One node of a cluster, as Ray counts what it has.

    Args:
        id: Ray's.
        name: its address.
        cpus: cores.
        gpus: GPUs.
        memory: bytes for processes; what was free when the node began, without the object store.
        store: bytes of its object store.
    """

    id: str
    name: str
    cpus: float
    gpus: float
    memory: float
    store: float


@dataclass(frozen=True)
class Need:
    """What one actor takes.

    Args:
        cpus: cores.
        gpus: GPUs, or a share of one.
        memory: bytes beside the object store.
        store: bytes of the object store of its node, which all actors of the node share.
    """

    cpus: float
    gpus: float
    memory: float
    store: float

    def fit(self, node: Node) -> int:
        """How many such actors a node can take."""
        shares = [node.memory / self.memory]
        shares += [node.cpus / self.cpus] if self.cpus else []
        shares += [node.gpus / self.gpus] if self.gpus else []
        return int(min(shares)) if node.store >= self.store else 0

    def __str__(self) -> str:
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return (
            f"{self.cpus:g} core{'s' * (self.cpus != 1)}{gpus}, {_size(self.memory)} of memory, and for all "
            f"actors of a node {_size(self.store)} of its object store"
        )


def connect(address: str | None, cpus: float) -> str:
    """Join a cluster or start one, unless this process is connected already.

    Args:
        address: auto for a cluster that runs on this machine, HOST:PORT for another; None for that of
            RAY_ADDRESS where it is set, and else for a Ray of this process's own on this machine.
        cpus: cores that a Ray of this process's own has at least, whether or not the machine has them.

    Returns:
        What the user should know of it, in one line.

    Raises:
        ConfigError: no cluster is there, or one of other versions.
    """
    wanted = address or os.environ.get(VARIABLE) or LOCAL
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if _connected[1:] != [here]:  # by the user, whom null and auto suit
            if address in (None, "auto", here):
                return f"ray: the cluster at {here}, to which this process was connected before"
            raise ConfigError(
                f"engine.address: this process is connected to the Ray at {here} already, got '{address}'; "
                "say ray.shutdown() first, or engine.address=null"
            )
        if _connected[0] == wanted and (wanted != LOCAL or _cores() >= cpus):
            return f"ray: the cluster at {here}, shared with the runs before"
        ray.shutdown()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as future releases do; else it warns
    if wanted == LOCAL:
        more = max(cpus, os.cpu_count() or 1)
        ray.init(LOCAL, num_cpus=math.ceil(more), include_dashboard=False, **quiet)
    else:
        _join(wanted, quiet)
    _connected[:] = [wanted, ray.get_runtime_context().gcs_address]
    if wanted == LOCAL:
        return "ray: started on this machine for this process; engine.address=auto joins a running cluster"
    count = len(nodes())
    return f"ray: joined the cluster at {_connected[1]} of {count} node{'s' * (count != 1)}"


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    whence = "engine.address" if os.environ.get(VARIABLE) != address else VARIABLE
    where = f"{whence}: expected a running Ray cluster at '{address}'"
    what = "start one by `ray start --head`, or use engine.address=null, which starts one for this process"
    host, _, port = address.rpartition(":")
    if address.startswith("ray://"):
        raise ConfigError(
            f"{whence}: expected auto or HOST:PORT, got '{address}', which is a Ray Client's; run on a node "
            "of the cluster, or by `ray job submit`"
        )
    if address != "auto":
        if not port.isdigit():
            raise ConfigError(f"{whence}: expected auto, HOST:PORT or null, got '{address}'")
        try:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), ANSWERS).close()
        except OSError as error:
            raise ConfigError(f"{where}, nothing answers there ({error}); {what}") from error
    try:
        ray.init(address, **quiet)
    except ConnectionError as error:
        raise ConfigError(f"{where}, got none: {_line(error)}; {what}") from error
    except RuntimeError as error:
        raise ConfigError(f"{where} that takes this process, got: {_line(error)}") from error


def nodes() -> list[Node]:
    """The nodes that are alive."""
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            has = node["Resources"]
            numbers = [has.get(key, 0.0) for key in ("CPU", "GPU", "memory", "object_store_memory")]
            found.append(Node(node["NodeID"], node["NodeManagerAddress"], *numbers))
    return found


def check_versions(there: Iterable[Node], known: Collection[str] = ()) -> None:
    """Raise ConfigError unless the nodes run this process's versions of what objects of one need at another.

    Args:
        there: the nodes.
        known: ids of those that have been asked before.
    """
    look, ours = _looker(), _looker()(SAME)
    asked = {
        ray.remote(look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote(SAME): node
        for node in there
        if node.id not in known
    }
    for answer, node in asked.items():
        try:
            theirs: dict[str, str] = ray.get(answer, timeout=LOOKS)
        except RayError as error:
            raise ConfigError(f"engine=ray: node {node.name} cannot be asked: {_line(error)}") from error
        differ = [f"{name} {theirs[name]}, here {ours[name]}" for name in SAME if theirs[name] != ours[name]]
        if differ:
            raise ConfigError(
                f"engine=ray: expected the same versions on every node, node {node.name} has "
                f"{'; '.join(differ)}; install the same there"
            )


def _cores() -> float:
    return sum(node.cpus for node in nodes())


def _looker() -> Callable[[Sequence[str]], dict[str, str]]:
    """A function that travels by its code, for a node that may have no fedlora, or another."""

    def look(names: Sequence[str]) -> dict[str, str]:
        import importlib
        import platform
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": platform.python_version()}
        for name in names[1:]:
            try:
                found[name] = (
                    importlib.import_module(name).__version__ if name == "fedlora" else version(name)
                )
            except (ImportError, PackageNotFoundError):
                found[name] = "missing"
        return found

    return look


def room(need: Need, there: Sequence[Node]) -> tuple[int, str]:
    """How many actors the nodes can take, and in words what each node has, for messages."""
    told = [
        f"{node.name} has {node.cpus:g} cores, {node.gpus:g} GPUs, {_size(node.memory)} of memory and "
        f"{_size(node.store)} of object store"
        for node in there
    ]
    return sum(need.fit(node) for node in there), "; ".join(told)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _line(error: BaseException) -> str:
    with suppress(AttributeError):
        error = error.cause or error  # type: ignore[attr-defined]
    return " ".join(str(error).split())[:400]
