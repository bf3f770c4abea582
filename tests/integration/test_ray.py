"""A Ray cluster gives what one process gives, also when a node of it dies."""

import importlib.util
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

import fedlora as fl
from fedlora.engines.in_process import InProcess
from fedlora.engines.ray import Ray
from fedlora.errors import ConfigError, FedLoraError

SHARED = Path(__file__).parents[1] / "shared"
JOB = ("clients=4", "rounds=2", "client.steps=3", "engine.fuse=2")
MIXED = (*JOB, "strategy=flexlora", "ranks=[2,4]")
SMALL = {"clients": 4, "rounds": 2, "ranks": 4, "progress": False}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # all of Ray's own
]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """What the tests bring can be imported wherever Ray starts a process, as it can be here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SHARED}{os.pathsep}{SHARED.parents[1]}", prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def cluster(importable: None) -> Iterator[Any]:
    """Two nodes of a core each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def two(cluster: Any) -> Any:
    """The cluster with its second node, which a test may kill."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not cluster.worker_nodes:
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
    return cluster


def tensors(folder: Path) -> dict[str, dict[str, bytes]]:
    """Every tensor of a run by file and name: its adapter, its checkpoints, what its clients keep."""
    return {
        str(path.relative_to(folder)): {name: t.numpy().tobytes() for name, t in load_file(path).items()}
        for path in folder.rglob("*.safetensors")
    }


def on(cluster: Any) -> tuple[str, ...]:
    return ("engine=ray", f"engine.address={cluster.address}")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("strategy=flora", "ranks=[2,4]"),  # what clients hold from the round before
        ("strategy=fedsalora", "ranks=4"),  # parts that clients keep, and their own evaluation
        ("strategy=fedit", "ranks=4", "secure_sum=true"),
        ("strategy=fedit", "ranks=4", "robust=norm"),
        ("strategy=fedit", "ranks=4", "evaluate.clients=true", "clients_per_round=3"),
    ],
    ids=lambda settings: " ".join(settings) or "flexlora",
)
def test_a_cluster_gives_the_adapter_of_one_process(
    run: Callable[..., Any], two: Any, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    alone = run(*MIXED, *settings)
    found = run(*MIXED, *settings, *on(two), out=tmp_path / "ray")
    assert tensors(found.path) == tensors(alone.path)
    for key in ("accuracy", "loss", "bytes_down", "bytes_up", "dropped", "clients", "own"):
        assert found.summary.get(key) == alone.summary.get(key), key
    assert [(c["client"], c["bytes_down"], c["status"]) for c in found.clients] == [
        (c["client"], c["bytes_down"], c["status"]) for c in alone.clients
    ]


def kill_once_trained(cluster: Any, folder: Path) -> threading.Thread:
    """Name the second node, and kill it when a client has trained on it."""
    [doomed] = cluster.worker_nodes
    [node] = [n["NodeID"] for n in _nodes(cluster) if n["NodeManagerPort"] == doomed.node_manager_port]
    (folder / "node").write_text(node)

    def kill() -> None:
        until = time.monotonic() + 600
        while not list(folder.glob("trained-*")) and time.monotonic() < until:
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _nodes(cluster: Any) -> list[dict[str, Any]]:
    import ray

    if not ray.is_initialized():
        ray.init(cluster.address, log_to_driver=False)
    return [node for node in ray.nodes() if node["Alive"]]


def test_the_groups_of_a_node_that_dies_are_done_elsewhere(two: Any, tmp_path: Path) -> None:
    from ray_lab import Waiting

    client = Waiting(lr=1e-3, folder=str(tmp_path))
    alone = fl.simulate("tiny", "tiny", client=client, engine=InProcess(fuse=2), **SMALL)
    killer = kill_once_trained(two, tmp_path)
    engine = Ray(address=two.address, fuse=2, actors=2)
    found = fl.simulate("tiny", "tiny", client=client, engine=engine, **SMALL)
    killer.join()
    assert list(tmp_path.glob("trained-*"))
    assert found.summary["adapter_sha256"] == alone.summary["adapter_sha256"]
    assert found.summary["dropped"] == 0


def test_a_result_that_nobody_read_costs_no_privacy(two: Any, tmp_path: Path) -> None:
    """The node dies once its clients have trained: what came of it was seen by nobody, and is not paid."""
    from ray_lab import Waiting

    private = {"strategy": "ffalora", "privacy": fl.privacy.DPSGD(epsilon=6, accountant="rdp")}
    client = Waiting(lr=1e-3, batch_size=4, folder=str(tmp_path))
    alone = fl.simulate("tiny", "tiny", client=client, engine=InProcess(fuse=2), **SMALL, **private)
    killer = kill_once_trained(two, tmp_path)
    engine = Ray(address=two.address, fuse=2, actors=2)
    found = fl.simulate("tiny", "tiny", client=client, engine=engine, **SMALL, **private)
    killer.join()
    assert list(tmp_path.glob("trained-*"))
    assert found.summary["dropped"] == 0
    assert found.summary["ledger"]["clients"] == alone.summary["ledger"]["clients"]
    for client_id, told in found.summary["ledger"]["clients"].items():
        lines = [line for line in found.clients if str(line["client"]) == client_id]
        assert sum(e["steps"] for e in told["entries"]) == sum(line["steps"] for line in lines)


def test_a_group_that_kills_its_actors_is_dropped_and_the_run_goes_on(two: Any) -> None:
    from ray_lab import Deadly

    engine = Ray(address=two.address, fuse=1)
    found = fl.simulate("tiny", "tiny", client=Deadly(lr=1e-3), engine=engine, **{**SMALL, "rounds": 1})
    assert [line["status"] for line in found.clients] == ["ok", "dropped", "ok", "ok"]
    assert "3 actors died over its group of 1 client" in found.clients[1]["reason"]


def test_a_node_of_another_version_is_named(two: Any, tmp_path: Path) -> None:
    package = tmp_path / "transformers-9.9.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strange = two.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)})  # found first
    try:
        with pytest.raises(ConfigError, match=r"node \S+ has transformers 9\.9, here \d\S+; install"):
            fl.simulate("tiny", "tiny", engine=Ray(address=two.address), **SMALL)
    finally:
        two.remove_node(strange)


def test_what_has_no_room_on_any_node_is_said(run: Callable[..., Any], two: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no node has room for an actor, which takes 3 cores, .* has 1 core"
    ):
        run(*MIXED, *on(two), "engine.cpus=3", out=tmp_path / "ray")
    with pytest.raises(FedLoraError, match=r"no actor could begin within 2 s, each takes 3 cores"):
        run(*MIXED, *on(two), "engine.cpus=3", "engine.actors=1", "engine.wait=2", out=tmp_path / "again")


def test_runs_of_one_process_share_a_ray_of_their_own(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    ray.shutdown()
    addresses, said = set(), []
    for seed in (0, 1):
        console = Console(record=True, width=500)
        overrides = ("engine=ray", "engine.actors=1", "rounds=1", f"seed={seed}")
        run(*MIXED, *overrides, out=tmp_path / str(seed), console=console)
        said.append(console.export_text())
        addresses.add(ray.get_runtime_context().gcs_address)
    assert len(addresses) == 1
    assert "ray: started on this machine for this process" in said[0]
    assert "shared with the runs before; 1 actor, each of 1 core" in said[1]
    ray.shutdown()


def test_what_goes_wrong_in_every_client_ends_the_run_in_one_line(
    run: Callable[..., Any], two: Any, tmp_path: Path
) -> None:
    with pytest.raises(FedLoraError, match="no client sent a good update"):
        run(*MIXED, *on(two), "client.lr=1e30", "rounds=1", out=tmp_path / "ray")


def test_an_address_where_nothing_is_ends_in_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    import ray

    ray.shutdown()
    for address, why in (
        ("127.0.0.1:1", r"expected a running Ray cluster at '127\.0\.0\.1:1', nothing answers there"),
        ("ray://127.0.0.1:10001", "expected auto or HOST:PORT, got 'ray://127"),
        ("nowhere", "expected auto, HOST:PORT or null, got 'nowhere'"),
    ):
        with pytest.raises(ConfigError, match=why):
            run(*MIXED, "engine=ray", f"engine.address={address}", out=tmp_path / address[:3])


def test_a_missing_ray_is_named(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*fedlora\[ray\]"):
        run(*MIXED, "engine=ray", out=tmp_path / "ray")


def test_a_run_goes_on_at_a_cluster_that_has_moved(
    run: Callable[..., Any], result: Any, two: Any, tmp_path: Path
) -> None:
    from fedlora.cli.run_job import run_job
    from fedlora.config.resume import continued

    alone = run(*MIXED, "strategy=flora")
    path = tmp_path / "ray"
    run(*MIXED, "strategy=flora", "rounds=1", "engine=ray", "engine.address=auto", out=path)
    config = continued(path, ["rounds=2", f"engine.address={two.address}"])
    assert config.engine.address == two.address
    found = result(run_job(config, Console()))
    assert tensors(found.path / "adapter") == tensors(alone.path / "adapter")
    assert f"address: {two.address}" in (path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"only rounds=N can change .* got 'engine\.actors=9'"):
        continued(path, ["rounds=3", "engine.actors=9"])
