import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import BOTH, Peer, State, Task, Update
from fedlora.core.parametrization import LORA
from fedlora.errors import CheckpointError
from fedlora.models.parametrizations import CoreMatrix

LAYERS = {"a": (4, 3), "b": (2, 5)}
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=DTYPES, ids=str)
def state(make, rng, request):
    def pairs(rank):
        return {m: make.pair(rng, *shape, rank, 1.0, request.param) for m, shape in LAYERS.items()}

    adapter = make.adapter(rng, LAYERS, 2, scale=1 / 3, dtype=request.param)
    core = {"b.core": make.tensor(rng, 2, 2).to(request.param)}
    adapter = Adapter(adapter.pairs, {**adapter.extra, **core}, CoreMatrix())
    memory = {"loss": torch.tensor(0.5), "active": torch.tensor(3), "a.sparse": make.tensor(rng, 7)}
    return State(adapter, 5, pairs(3), memory, 9, {"energy_kept": 1 / 3})


def test_a_state_survives_safetensors_bytes_bit_for_bit(state):
    tensors, header = state.pack()
    back = State.unpack(load(save(tensors)), header)
    assert back.digest() == state.digest()
    assert back.adapter.digest() == state.adapter.digest()
    assert (back.round, back.seed, back.metrics) == (5, 9, {"energy_kept": 1 / 3})
    assert back.adapter.pairs["a"].scale == 1 / 3
    assert back.adapter.parametrization == CoreMatrix()
    assert torch.equal(back.adapter.extra["b.core"], state.adapter.extra["b.core"])
    assert {n: (t.dtype, t.shape) for n, t in back.memory.items()} == {
        n: (t.dtype, t.shape) for n, t in state.memory.items()
    }
    assert back.base_delta.keys() == {"a", "b"}
    assert back.pack()[1] == header


def test_the_digest_of_a_state_is_over_all_of_it(state):
    one, double = (
        torch.ones(1),
        {**state.base_delta, "a": replace(state.base_delta["a"], B=2 * state.base_delta["a"].B)},
    )
    others = [
        replace(state, adapter=Adapter(state.adapter.pairs)),
        replace(state, adapter=replace(state.adapter, parametrization=LORA)),
        replace(state, round=6),
        replace(state, base_delta={"a": state.base_delta["a"]}),
        replace(state, base_delta={"b": state.base_delta["a"], "a": state.base_delta["b"]}),
        replace(state, base_delta={}),
        replace(state, base_delta=double),
        replace(state, memory={**state.memory, "active": torch.tensor(4)}),
        replace(state, memory={**state.memory, "more": one}),
        replace(state, seed=8),
        replace(state, metrics={}),
        replace(
            state, adapter=Adapter({**state.adapter.pairs, "a": replace(state.adapter.pairs["a"], scale=1)})
        ),
    ]
    assert len({state.digest(), *(other.digest() for other in others)}) == len(others) + 1
    assert replace(state, base_delta=dict(reversed([*state.base_delta.items()]))).digest() == state.digest()


def test_a_state_is_hashed_once_however_often_it_is_asked(state, monkeypatch):
    """The round's look at what moved, the checkpoint and its seal all ask."""
    hashed = []
    monkeypatch.setattr("fedlora.core.messages.digest", lambda *given: hashed.append(given) or "seal")
    for _ in range(3):
        assert state.tensor_digest == "seal"
        state.pack()[0].clear()
        state.digest()
    assert sum(bool(tensors) for _, tensors in hashed) == 1
    assert state.pack()[0]


def test_the_digest_of_the_tensors_says_whether_training_moved_anything(state):
    renumbered = replace(state, round=6, metrics={})
    assert renumbered.tensor_digest == state.tensor_digest
    assert renumbered.digest() != state.digest()
    moved = replace(state, memory={**state.memory, "active": torch.tensor(4)})
    assert moved.tensor_digest != state.tensor_digest


def test_factors_of_any_memory_layout_can_be_saved():
    pair = Pair(torch.ones(3, 2).T, torch.ones(2, 4).T)
    tensors, header = State(
        Adapter({"m": pair}, {"w": torch.ones(4, 6)[:, ::2]}), base_delta={"m": pair}
    ).pack()
    assert State.unpack(load(save(tensors)), header).adapter.pairs["m"].shape == (4, 3)


def test_the_header_is_one_line(state):
    assert "\n" not in state.pack()[1]


def test_unpacking_leaves_what_was_read_as_it_was(state):
    tensors, header = state.pack()
    names = list(tensors)
    State.unpack(tensors, header)
    assert list(tensors) == names


@pytest.mark.parametrize(
    "name",
    [
        *("adapter/a.A", "adapter/a.B", "adapter/b.A", "adapter/b.B", "fold/b.B"),
        *("adapter/head.bias", "adapter/head.weight", "adapter/b.core", "memory/loss"),
    ],
)
def test_a_missing_tensor_is_a_checkpoint_error_that_names_it(state, name):
    tensors, header = state.pack()
    del tensors[name]
    with pytest.raises(CheckpointError, match=name):
        State.unpack(tensors, header)


@pytest.mark.parametrize("key", ["adapter", "round", "fold", "memory", "seed", "metrics"])
def test_a_missing_field_is_a_checkpoint_error_that_names_it(state, key):
    tensors, header = state.pack()
    fields = json.loads(header)
    del fields[key]
    with pytest.raises(CheckpointError, match=key):
        State.unpack(tensors, json.dumps(fields))


@pytest.mark.parametrize("header", ["", "{", "[]", "null", "3", '{"round": 1, "forms": null}'])
def test_a_header_of_another_kind_is_a_checkpoint_error(state, header):
    with pytest.raises(CheckpointError):
        State.unpack(state.pack()[0], header)


def test_factors_that_no_longer_fit_are_a_checkpoint_error(state):
    tensors, header = state.pack()
    tensors["adapter/a.B"] = tensors["adapter/a.B"][:, :1].contiguous()
    with pytest.raises(CheckpointError):
        State.unpack(tensors, header)


def test_delta_is_the_base_delta_and_scale_times_B_times_M_times_A(make, rng):
    state = State(make.adapter(rng, LAYERS, 2, scale=3.0))
    pair, M = state.adapter.pairs["b"], make.tensor(rng, 2, 2)
    want = np.einsum("or,ri->oi", pair.B.numpy(), pair.A.numpy()) * 3
    assert state.delta("b").shape == (2, 5)
    assert np.allclose(state.delta("b").numpy(), want, rtol=1e-14, atol=0)
    base_delta = make.pair(rng, 2, 5, 3)
    core = State(Adapter({"b": pair}, {"b.core": M}, CoreMatrix()), base_delta={"b": base_delta})
    want = 3 * pair.B @ M @ pair.A + base_delta.B @ base_delta.A
    assert np.allclose(core.delta("b").numpy(), want.numpy(), rtol=1e-13, atol=1e-13)


def test_the_whole_has_the_base_delta_of_a_module_without_a_pair_too(make, np64, rng):
    base_delta = {"a": make.pair(rng, 4, 3, 1), "c": make.pair(rng, 3, 3, 2)}
    pairs = {"a": make.pair(rng, 4, 3, 1, 0.5), "b": make.pair(rng, 2, 5, 2, 0.3)}
    cores = {"a.core": make.tensor(rng, 1, 1), "b.core": make.tensor(rng, 2, 2)}
    adapter = Adapter(pairs, {"head": torch.ones(2), **cores}, CoreMatrix())
    whole = State(adapter, base_delta=base_delta).whole()
    assert whole.pairs.keys() == {"a", "b", "c"}
    assert whole.extra.keys() == {"head"}
    assert np64.close(np64.delta(whole.pairs["a"]), np64.change(adapter, "a") + np64.delta(base_delta["a"]))
    assert np64.close(np64.delta(whole.pairs["b"]), np64.change(adapter, "b"))
    assert np64.close(np64.delta(whole.pairs["c"]), np64.delta(base_delta["c"]))
    assert whole.parametrization == LORA


def test_the_defaults_are_a_plain_round():
    task, update = Task(Adapter({})), Update(Adapter({}))
    assert task.train == task.share == BOTH == {"A", "B"}
    assert (task.personal, task.frozen, dict(task.base_delta), task.method) == (
        frozenset(),
        frozenset(),
        {},
        (),
    )
    assert (update.weight, update.peer, dict(update.metrics)) == (1.0, None, {})
    state = State(Adapter({}))
    assert (state.round, state.seed, dict(state.base_delta), dict(state.memory)) == (0, 0, {}, {})
    assert (dict(Peer(1, 4).ranks), dict(Peer(1, 4).scales)) == ({}, {})
