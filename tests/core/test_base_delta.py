"""What is added to the base: it grows alike on both sides, and is hashed once for all clients."""

import numpy as np
import pytest
import torch

from fedlora.core import base_delta
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.core.base_delta import BaseDelta
from fedlora.core.messages import State, Task


def test_it_is_a_mapping_of_pairs_and_of_any_mapping_one_is_made(make, rng):
    pairs = {"b": make.pair(rng, 4, 3, 1), "a": make.pair(rng, 4, 3, 2)}
    for delta in (BaseDelta(pairs), BaseDelta.of(pairs), Task(Adapter({}), base_delta=pairs).base_delta):
        assert dict(delta) == pairs
        assert (len(delta), "a" in delta, delta.get("c")) == (2, True, None)
        assert delta.increment == {}
        assert BaseDelta.of(delta) is delta
        assert (
            Task(Adapter({}), base_delta=delta).base_delta
            is delta
            is State(Adapter({}), base_delta=delta).base_delta
        )
    assert not BaseDelta()


def test_what_grew_by_its_increments_is_the_same_for_server_and_client(make, rng):
    """Through bytes, over many rounds, beyond the rank where the sum becomes dense."""
    server = client = BaseDelta()
    for _ in range(6):
        server = server.plus({"a": make.pair(rng, 4, 3, 1)})
        sent = Task.unpack(*Task(Adapter({}), base_delta=server.increment).pack()).base_delta
        client = client.plus(sent)
        assert Adapter(server).digest() == Adapter(client).digest()
        assert server.increment["a"].rank == 1


def test_a_module_without_an_increment_stays(make, rng):
    old = BaseDelta({"a": make.pair(rng, 4, 3, 1), "b": make.pair(rng, 4, 3, 1)})
    new = old.plus({"b": make.pair(rng, 4, 3, 1)})
    assert new["a"] is old["a"]
    assert (new["b"].rank, new.increment.keys()) == (2, {"b"})


def test_its_tensors_are_hashed_once_however_many_clients_are_sent_it(make, rng, monkeypatch):
    state = State(Adapter({}), base_delta={"m": make.pair(rng, 4, 3, 1)})
    tasks = [Task(Adapter({}), base_delta=state.base_delta) for _ in range(3)]
    hashed = []
    monkeypatch.setattr(base_delta, "digest", lambda header, tensors: hashed.append(list(tensors)) or "x")
    assert [task.base_delta.digests for task in tasks] == [{"m.A": "x", "m.B": "x"}] * 3
    assert len(hashed) == 2


@pytest.mark.parametrize("factor", ["A", "B"])
def test_its_digests_are_those_of_its_tensors(factor):
    one = BaseDelta({"m": Pair(torch.ones(1, 3), torch.ones(4, 1))}).digests
    moved = {"A": torch.ones(1, 3), "B": torch.ones(4, 1)}
    moved[factor] = 2 * moved[factor]
    other = BaseDelta({"m": Pair(**moved)}).digests
    assert {name for name in one if one[name] != other[name]} == {f"m.{factor}"}


def test_an_increment_of_another_scale_is_kept_as_it_is_sent() -> None:
    rng = np.random.default_rng(5)
    A, B = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((2, 8), (6, 2)))
    grown = BaseDelta().plus({"m": Pair(A, B, 2.0)}).plus({"m": Pair(A, B, 0.5)})
    assert grown.increment["m"].scale == 1.0
    torch.testing.assert_close(dense(grown["m"]), 2.5 * B @ A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(grown.increment["m"]), 0.5 * B @ A, rtol=1e-5, atol=1e-5)
