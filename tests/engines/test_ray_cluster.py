"""Which nodes have room for an actor, and what is said of a cluster that cannot be joined."""

import pytest

from fedlora.engines.ray import Ray
from fedlora.errors import ConfigError

ray = pytest.importorskip("ray")
from fedlora.engines.ray_cluster import Need, Node, connect, room  # noqa: E402 (needs Ray)

GB = 1e9
NODES = [
    Node("a", "10.0.0.1", 0, 0, 100 * GB, 50 * GB),
    Node("b", "10.0.0.2", 16, 0, 8 * GB, 4 * GB),
    Node("c", "10.0.0.3", 4, 2, 64 * GB, 20 * GB),
]


@pytest.mark.parametrize(
    ("need", "fit"),
    [
        (Need(1, 0, 1 * GB, 1 * GB), 8 + 4),  # the memory of one, the cores of the other
        (Need(2, 0, 1 * GB, 1 * GB), 8 + 2),
        (Need(1, 0, 1 * GB, 5 * GB), 4),  # the model does not go into the object store of b
        (Need(1, 1, 1 * GB, 1 * GB), 2),
        (Need(1, 0.5, 1 * GB, 1 * GB), 4),
        (Need(1, 4, 1 * GB, 1 * GB), 0),
        (Need(1, 0, 99 * GB, 1 * GB), 0),
    ],
)
def test_room_is_counted_node_by_node(need: Need, fit: int) -> None:
    found, what = room(need, NODES)
    assert found == fit
    assert "10.0.0.2 has 16 cores, 0 GPUs, 8.0 GB of memory and 4.0 GB of object store" in what


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (
            "127.0.0.1:1",
            r"^engine\.address: expected a running .* at '127\.0\.0\.1:1', nothing answers there",
        ),
        ("ray://127.0.0.1:10001", r"^engine\.address: expected auto or HOST:PORT, got 'ray://"),
        ("nowhere", r"^engine\.address: expected auto, HOST:PORT or null, got 'nowhere'"),
    ],
)
def test_an_address_where_no_cluster_is_ends_in_one_line(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=why):
        connect(address, 1)


def test_the_variable_of_ray_is_followed_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ConfigError, match=r"^RAY_ADDRESS: expected a running Ray cluster at '127\.0\.0\.1:1'"
    ):
        connect(None, 1)


def test_a_connection_of_the_user_is_used_and_never_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        gcs_address = "10.0.0.9:6379"

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.delattr(ray, "shutdown")
    for address in (None, "auto", "10.0.0.9:6379"):
        assert connect(address, 99) == (
            "ray: the cluster at 10.0.0.9:6379, to which this process was connected before"
        )
    with pytest.raises(
        ConfigError, match=r"connected to the Ray at 10\.0\.0\.9:6379 already, got '10\.0\.0\.1:1'"
    ):
        connect("10.0.0.1:1", 1)


@pytest.mark.parametrize("wrong", [{"actors": 0}, {"cpus": 0}, {"gpus": -1.0}, {"fuse": 0}, {"fuse": "all"}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{next(iter(wrong))}"):
        Ray(**wrong)  # type: ignore[arg-type]
