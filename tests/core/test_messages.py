import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import accumulate
from fedlora.core.messages import BOTH, Peer, State, Tail, Task, Update
from fedlora.errors import CheckpointError

LAYERS = {"a": (4, 3), "b": (2, 5)}
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=DTYPES, ids=str)
def state(make, rng, request):
    def pairs(rank):
        return {m: make.pair(rng, *shape, rank, 1.0, request.param) for m, shape in LAYERS.items()}

    adapter = make.adapter(rng, LAYERS, 2, scale=1 / 3, dtype=request.param)
    b = adapter.pairs["b"]
    adapter = Adapter({**adapter.pairs, "b": replace(b, M=make.tensor(rng, 2, 2).to(b.A))}, adapter.extra)
    memory = {"loss": torch.tensor(0.5), "active": torch.tensor(3), "a.sparse": make.tensor(rng, 7)}
    return State(adapter, 5, pairs(3), {"a": pairs(1)["a"]}, memory, 9, {"energy_kept": 1 / 3})


def test_a_state_survives_safetensors_bytes_bit_for_bit(state):
    tensors, header = state.pack()
    back = State.unpack(load(save(tensors)), header)
    assert back.digest() == state.digest()
    assert back.adapter.digest() == state.adapter.digest()
    assert (back.round, back.seed, back.metrics) == (5, 9, {"energy_kept": 1 / 3})
    assert back.adapter.pairs["a"].scale == 1 / 3
    assert back.adapter.pairs["a"].M is None
    assert torch.equal(back.adapter.pairs["b"].M, state.adapter.pairs["b"].M)
    assert {n: (t.dtype, t.shape) for n, t in back.memory.items()} == {
        n: (t.dtype, t.shape) for n, t in state.memory.items()
    }
    assert (back.fold.keys(), back.gain.keys()) == ({"a", "b"}, {"a"})
    assert back.pack()[1] == header


def test_the_digest_of_a_state_is_over_all_of_it(state):
    one, double = torch.ones(1), {"a": replace(state.gain["a"], B=2 * state.gain["a"].B)}
    others = [
        replace(state, adapter=Adapter(state.adapter.pairs)),
        replace(state, round=6),
        replace(state, fold={"a": state.fold["a"]}),
        replace(state, fold={"b": state.fold["a"], "a": state.fold["b"]}),
        replace(state, gain={}),
        replace(state, gain=double),
        replace(state, memory={**state.memory, "active": torch.tensor(4)}),
        replace(state, memory={**state.memory, "more": one}),
        replace(state, seed=8),
        replace(state, metrics={}),
        replace(
            state, adapter=Adapter({**state.adapter.pairs, "a": replace(state.adapter.pairs["a"], scale=1)})
        ),
    ]
    assert len({state.digest(), *(other.digest() for other in others)}) == len(others) + 1
    assert replace(state, fold=dict(reversed(state.fold.items()))).digest() == state.digest()


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
    told = replace(state, round=6, metrics={})
    assert told.tensor_digest == state.tensor_digest
    assert told.digest() != state.digest()
    moved = replace(state, memory={**state.memory, "active": torch.tensor(4)})
    assert moved.tensor_digest != state.tensor_digest


def test_factors_of_any_memory_layout_can_be_saved():
    pair = Pair(torch.ones(3, 2).T, torch.ones(2, 4).T)
    tensors, header = State(Adapter({"m": pair}, {"w": torch.ones(4, 6)[:, ::2]}), fold={"m": pair}).pack()
    assert State.unpack(load(save(tensors)), header).adapter.pairs["m"].shape == (4, 3)


def test_the_header_is_one_line(state):
    assert "\n" not in state.pack()[1]
    assert "\n" not in Task(state.adapter, expert=state.adapter).pack()[1]


def test_unpacking_leaves_what_was_read_as_it_was(state):
    tensors, header = state.pack()
    names = list(tensors)
    State.unpack(tensors, header)
    assert list(tensors) == names


@pytest.mark.parametrize(
    "name",
    [
        *("adapter/a.A", "adapter/a.B", "adapter/b.A", "adapter/b.B", "fold/b.B", "gain/a.A"),
        *("adapter/head.bias", "adapter/head.weight", "memory/loss"),
    ],
)
def test_a_missing_tensor_is_a_checkpoint_error_that_names_it(state, name):
    tensors, header = state.pack()
    del tensors[name]
    with pytest.raises(CheckpointError, match=name):
        State.unpack(tensors, header)


def test_a_missing_core_is_seen(state):
    """Not by its name, since a pair may have none, but by the digest that a checkpoint keeps."""
    tensors, header = state.pack()
    del tensors["adapter/b.M"]
    assert State.unpack(tensors, header).digest() != state.digest()


@pytest.mark.parametrize("key", ["round", "forms", "seed", "metrics"])
def test_a_missing_field_is_a_checkpoint_error_that_names_it(state, key):
    tensors, header = state.pack()
    fields = json.loads(header)
    del fields[key]
    with pytest.raises(CheckpointError, match=key):
        State.unpack(tensors, json.dumps(fields))


@pytest.mark.parametrize("part", ["adapter", "fold", "gain", "memory"])
def test_a_missing_part_is_a_checkpoint_error_that_names_it(state, part):
    tensors, header = state.pack()
    fields = json.loads(header)
    del fields["forms"][part]
    with pytest.raises(CheckpointError, match=part):
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


def test_delta_is_the_fold_and_scale_times_B_times_M_times_A(make, rng):
    state = State(make.adapter(rng, LAYERS, 2, scale=3.0))
    pair, M = state.adapter.pairs["b"], make.tensor(rng, 2, 2)
    want = np.einsum("or,ri->oi", pair.B.numpy(), pair.A.numpy()) * 3
    assert state.delta("b").shape == (2, 5)
    assert np.allclose(state.delta("b").numpy(), want, rtol=1e-14, atol=0)
    fold = make.pair(rng, 2, 5, 3)
    core = State(Adapter({"b": replace(pair, M=M)}), fold={"b": fold})
    want = 3 * pair.B @ M @ pair.A + fold.B @ fold.A
    assert np.allclose(core.delta("b").numpy(), want.numpy(), rtol=1e-13, atol=1e-13)


def test_the_whole_has_the_fold_of_a_module_without_a_pair_too(make, np64, rng):
    fold = {"a": make.pair(rng, 4, 3, 1), "c": make.pair(rng, 3, 3, 2)}
    pair = replace(make.pair(rng, 2, 5, 2, 0.3), M=make.tensor(rng, 2, 2))
    adapter = Adapter({"a": make.pair(rng, 4, 3, 1, 0.5), "b": pair}, {"head": torch.ones(2)})
    whole = State(adapter, fold=fold).whole()
    assert whole.pairs.keys() == {"a", "b", "c"}
    assert whole.extra.keys() == {"head"}
    assert np64.close(np64.delta(whole.pairs["a"]), np64.delta(adapter.pairs["a"]) + np64.delta(fold["a"]))
    assert np64.close(np64.delta(whole.pairs["b"]), np64.delta(pair))
    assert np64.close(np64.delta(whole.pairs["c"]), np64.delta(fold["c"]))
    assert all(found.M is None for found in whole.pairs.values())


def test_the_defaults_are_a_plain_round():
    task, update = Task(Adapter({})), Update(Adapter({}))
    assert task.train == task.share == BOTH == {"A", "B"}
    assert (task.own_extra, task.active, task.mask, task.tail, task.expert) == (False, None, None, None, None)
    assert (dict(task.fold), dict(task.gain)) == ({}, {})
    assert (update.weight, update.peer, dict(update.metrics)) == (1.0, None, {})
    state = State(Adapter({}))
    assert (state.round, state.seed, *map(dict, (state.fold, state.gain, state.memory))) == (0, 0, {}, {}, {})
    assert (dict(Peer(1, 4).ranks), dict(Peer(1, 4).scales)) == ({}, {})


# --- tasks --------------------------------------------------------------------------------------------------


def full(make, rng, **more):
    adapter = make.adapter(rng, LAYERS, 2, 0.7)
    fold = {"a": make.pair(rng, 4, 3, 2)}
    gain = {"a": make.pair(rng, 4, 3, 1)}
    tail, expert = Tail(0.5, 0.1, 2), make.adapter(rng, LAYERS, 3, 0.2)
    given = {"fold": fold, "gain": gain, "tail": tail, "expert": expert, "mask": 5, "own_extra": True}
    return Task(adapter, frozenset("B"), frozenset("B"), active=frozenset("b"), **(given | more))


def test_a_task_survives_its_tensors_and_its_header(make, rng):
    for task in (full(make, rng), Task(Adapter({})), full(make, rng, mask=0, tail=None, expert=None)):
        tensors, header = task.pack()
        back = Task.unpack(load(save(tensors)) if tensors else {}, header)
        for field in ("train", "share", "own_extra", "active", "mask", "tail"):
            assert getattr(back, field) == getattr(task, field)
        assert back.pack()[1] == header
        assert State(back.adapter, 0, back.fold, back.gain).digest() == (
            State(task.adapter, 0, task.fold, task.gain).digest()
        )
        assert (back.expert is None) == (task.expert is None)
        assert back.expert is None or back.expert.digest() == task.expert.digest()


def test_an_empty_set_of_active_modules_is_not_all_of_them(make, rng):
    task = Task(make.adapter(rng, LAYERS, 2), active=frozenset())
    back = Task.unpack(*task.pack())
    assert back.active == frozenset()
    assert back.shared() == ["head.bias", "head.weight"]


def test_the_gain_of_a_task_may_be_missing(make, rng):
    tensors, header = full(make, rng).pack()
    kept = {name: t for name, t in tensors.items() if not name.startswith("gain/")}
    assert len(kept) == len(tensors) - 2
    assert Task.unpack(kept, header).gain == {}


@pytest.mark.parametrize("name", ["adapter/a.A", "fold/a.B", "expert/b.A", "adapter/head.bias"])
def test_anything_else_that_is_missing_is_a_key_error_that_names_it(make, rng, name):
    tensors, header = full(make, rng).pack()
    with pytest.raises(KeyError, match=name):
        Task.unpack({n: t for n, t in tensors.items() if n != name}, header)


@pytest.mark.parametrize(
    ("train", "share", "own_extra", "active", "shared", "own"),
    [
        ("AB", "AB", False, None, "a.A a.B b.A b.B head.bias head.weight", ""),
        ("B", "B", False, None, "a.B b.B head.bias head.weight", ""),
        ("AB", "A", False, None, "a.A b.A head.bias head.weight", "a.B b.B"),
        ("AB", "A", True, None, "a.A b.A", "a.B b.B head.bias head.weight"),
        ("AB", "A", False, "b", "b.A head.bias head.weight", "b.B"),
        ("", "", False, None, "head.bias head.weight", ""),
    ],
)
def test_what_is_shared_and_what_is_a_client_s_own(make, rng, train, share, own_extra, active, shared, own):
    adapter = make.adapter(rng, LAYERS, 2)
    active = None if active is None else frozenset(active)
    task = Task(adapter, frozenset(train), frozenset(share), own_extra, active)
    assert task.shared() == shared.split()
    assert task.own() == own.split()
    assert [m for m in LAYERS if task.trains(m)] == (["b"] if active else ["a", "b"])


def test_a_core_is_shared_by_its_name(make, rng):
    pair = replace(make.pair(rng, 4, 3, 2), M=torch.eye(2, dtype=torch.float64))
    task = Task(Adapter({"a": pair}), frozenset("M"), frozenset("M"))
    assert task.shared() == ["a.M"]
    assert Task(Adapter({"a": pair}), frozenset("BM"), frozenset("B")).own() == ["a.M"]


@pytest.mark.parametrize(
    ("gamma", "rank", "start", "pruned"),
    [
        (0.99, 8, 7, 7),
        (0.99, 100, 99, 99),
        (0.5, 5, 2, 3),
        (0.5, 2, 1, 2),
        (0.29, 100, 29, 29),  # 0.29 · 100 = 28.999…
        (0.9, 1, 0, 1),
    ],
)
def test_a_tail_is_never_empty_and_a_pruning_never_goes_below_the_least(gamma, rank, start, pruned):
    tail = Tail(gamma, 0.1, 3)
    assert tail.start(rank) == start < rank
    assert tail.pruned(rank) == pruned
    assert tail.pruned(rank) >= min(3, rank)


def test_a_fold_that_grew_by_its_gain_is_the_same_for_server_and_client(make, rng):
    """Through bytes, over many rounds, beyond the rank where the sum becomes dense."""
    server, client = {}, {}
    for _ in range(6):
        gain = make.pair(rng, 4, 3, 1)
        server = {"a": accumulate(server.get("a"), gain)}
        sent = State.unpack(*State(Adapter({}), gain={"a": gain}).pack()).gain["a"]
        client = {"a": accumulate(client.get("a"), sent)}
        assert Adapter(server).digest() == Adapter(client).digest()


@pytest.mark.parametrize("rank", [1, 2, 8, 200])
def test_a_tail_is_never_empty_however_near_gamma_is_to_1(rank: int) -> None:
    assert Tail(1 - 1e-11, 0.1, 1).start(rank) == rank - 1
