import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedlora.adapter import Adapter, Pair
from fedlora.errors import CheckpointError
from fedlora.protocol import BOTH, Peer, State, Task, Update

LAYERS = {"a": (4, 3), "b": (2, 5)}


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float64], ids=str)
def state(make, rng, request):
    return State(make.adapter(rng, LAYERS, 2, scale=1 / 3, dtype=request.param), 5)


def test_a_state_survives_safetensors_bytes_bit_for_bit(state):
    tensors, header = state.pack()
    back = State.unpack(load(save(tensors)), header)
    assert back.adapter.digest() == state.adapter.digest()
    assert back.round == 5
    assert back.adapter.pairs["a"].scale == 1 / 3
    assert back.pack()[1] == header


def test_factors_of_any_memory_layout_can_be_saved():
    pair = Pair(torch.ones(3, 2).T, torch.ones(2, 4).T)
    tensors, header = State(Adapter({"m": pair}, {"w": torch.ones(4, 6)[:, ::2]})).pack()
    assert State.unpack(load(save(tensors)), header).adapter.pairs["m"].shape == (4, 3)


def test_the_header_is_one_line(state):
    assert "\n" not in state.pack()[1]


def test_unpacking_leaves_what_was_read_as_it_was(state):
    tensors, header = state.pack()
    names = list(tensors)
    State.unpack(tensors, header)
    assert list(tensors) == names


@pytest.mark.parametrize("name", ["a.A", "a.B", "b.A", "b.B"])
def test_a_missing_factor_is_a_checkpoint_error_that_names_it(state, name):
    tensors, header = state.pack()
    del tensors[name]
    with pytest.raises(CheckpointError, match=name):
        State.unpack(tensors, header)


@pytest.mark.parametrize("name", ["head.bias", "head.weight"])
def test_a_missing_extra_is_a_checkpoint_error_that_names_it(state, name):
    tensors, header = state.pack()
    del tensors[name]
    with pytest.raises(CheckpointError, match=name):
        State.unpack(tensors, header)


@pytest.mark.parametrize("key", ["round", "scales"])
def test_a_missing_field_is_a_checkpoint_error_that_names_it(state, key):
    tensors, header = state.pack()
    fields = json.loads(header)
    del fields[key]
    with pytest.raises(CheckpointError, match=key):
        State.unpack(tensors, json.dumps(fields))


@pytest.mark.parametrize("header", ["", "{", "[]", "null", "3", '{"round": 1, "scales": null}'])
def test_a_header_of_another_kind_is_a_checkpoint_error(state, header):
    with pytest.raises(CheckpointError):
        State.unpack(state.pack()[0], header)


def test_factors_that_no_longer_fit_are_a_checkpoint_error(state):
    tensors, header = state.pack()
    tensors["a.B"] = tensors["a.B"][:, :1].contiguous()
    with pytest.raises(CheckpointError):
        State.unpack(tensors, header)


def test_delta_is_scale_times_B_times_A(make, rng):
    state = State(make.adapter(rng, LAYERS, 2, scale=3.0))
    pair = state.adapter.pairs["b"]
    want = np.einsum("or,ri->oi", pair.B.numpy(), pair.A.numpy()) * 3
    assert state.delta("b").shape == (2, 5)
    assert np.allclose(state.delta("b").numpy(), want, rtol=1e-14, atol=0)


def test_the_defaults_are_a_plain_round():
    task, update = Task(Adapter({})), Update(Adapter({}))
    assert task.train == task.share == BOTH == {"A", "B"}
    assert (update.weight, update.peer, dict(update.metrics)) == (1.0, None, {})
    assert State(Adapter({})).round == 0
    assert (dict(Peer(1, 4).ranks), dict(Peer(1, 4).scales)) == ({}, {})
