"""What a task asks for: which tensors are trained, shared, the client's own, or left alone."""

import pytest
import torch
from safetensors.torch import load, save

from fedlora.core.adapter import Adapter, digest
from fedlora.core.messages import Task
from fedlora.errors import ConfigError
from fedlora.models.parametrizations import CoreMatrix
from fedlora.training.expert import GlobalExpert
from fedlora.training.rules import FedProx, RankPruning

LAYERS = {"a": (4, 3), "b": (2, 5)}


def full(make, rng, **more):
    method = (RankPruning(0.5, 0.1, 2), GlobalExpert(make.adapter(rng, LAYERS, 3, 0.2), frozenset("a")))
    given = {"base_delta": {"a": make.pair(rng, 4, 3, 2)}, "method": method, "personal": frozenset({"head"})}
    adapter = make.adapter(rng, LAYERS, 2, 0.7)
    return Task(adapter, frozenset("B"), frozenset("B"), frozen=frozenset("a"), **(given | more))


def test_a_task_survives_its_tensors_and_its_header(make, rng):
    for task in (full(make, rng), Task(Adapter({})), full(make, rng, method=(FedProx(0),))):
        tensors, header = task.pack()
        assert "\n" not in header
        back = Task.unpack(load(save(tensors)) if tensors else {}, header)
        for field in ("train", "share", "personal", "frozen"):
            assert getattr(back, field) == getattr(task, field)
        assert [type(part) for part in back.method] == [type(part) for part in task.method]
        assert back.part(RankPruning) == task.part(RankPruning)
        assert back.pack()[1] == header
        assert digest("", back.pack()[0].items()) == digest("", tensors.items())


@pytest.mark.parametrize("name", ["adapter/a.A", "fold/a.B", "method/1/adapter/b.A", "adapter/head.bias"])
def test_a_tensor_that_is_missing_is_a_key_error_that_names_it(make, rng, name):
    tensors, header = full(make, rng).pack()
    with pytest.raises(KeyError, match=name):
        Task.unpack({n: t for n, t in tensors.items() if n != name}, header)


EVERY = "a.A a.B b.A b.B head.bias head.weight"


@pytest.mark.parametrize(
    ("train", "share", "personal", "frozen", "trained", "shared", "own"),
    [
        ("AB", "AB", "", "", EVERY, EVERY, ""),
        ("B", "B", "", "", "a.B b.B head.bias head.weight", "a.B b.B head.bias head.weight", ""),
        ("AB", "A", "", "", EVERY, "a.A b.A head.bias head.weight", "a.B b.B"),
        ("AB", "A", "head", "", EVERY, "a.A b.A", "a.B b.B head.bias head.weight"),
        ("AB", "A", "head.bias", "", EVERY, "a.A b.A head.weight", "a.B b.B head.bias"),
        ("AB", "AB", "b", "", EVERY, "a.A a.B head.bias head.weight", "b.A b.B"),
        ("AB", "AB", "b.A", "a", "b.A b.B head.bias head.weight", "b.B head.bias head.weight", "b.A"),
        ("AB", "A", "", "a", "b.A b.B head.bias head.weight", "b.A head.bias head.weight", "b.B"),
        ("AB", "AB", "a b", "a b head", "", "", ""),
        ("", "", "", "", "head.bias head.weight", "head.bias head.weight", ""),
        ("", "", "", "head", "", "", ""),
        ("B", "AB", "", "head", "a.B b.B", "a.A a.B b.A b.B", ""),
    ],
)
def test_what_is_trained_what_is_shared_and_what_is_a_client_s_own(
    make, rng, train, share, personal, frozen, trained, shared, own
):
    sets = (frozenset(train), frozenset(share), frozenset(personal.split()), frozenset(frozen.split()))
    task = Task(make.adapter(rng, LAYERS, 2), *sets)
    assert (task.trained(), task.shared(), task.own()) == (trained.split(), shared.split(), own.split())


def test_a_name_stands_for_what_is_below_its_dots_and_for_no_longer_word(make, rng):
    layers = {"layer.1.q": (2, 3), "layer.10.q": (2, 3), "layer.1.qv": (2, 3)}
    adapter = Adapter(make.adapter(rng, layers, 1).pairs, {"layer.1.q": torch.ones(1)})
    task = Task(adapter, frozen=frozenset({"layer.1.q"}))
    assert task.trained() == ["layer.1.qv.A", "layer.1.qv.B", "layer.10.q.A", "layer.10.q.B"]
    assert Task(adapter, frozen=frozenset({"layer"})).trained() == []


@pytest.mark.parametrize("name", ["c", "a.C", "hea", "head.bias.more", ""])
@pytest.mark.parametrize("what", ["personal", "frozen"])
def test_a_name_of_nothing_is_refused_since_a_part_would_leave_the_client_by_mistake(make, rng, what, name):
    with pytest.raises(ConfigError, match=rf"Task\.{what}: expected .*, got '{name}'"):
        Task(make.adapter(rng, LAYERS, 2), **{what: frozenset({name})})


def test_the_factors_of_a_parametrization_are_extras_that_are_trained_and_shared(make, rng):
    adapter = make.adapter(rng, {"a": (4, 3)}, 2)
    adapter = Adapter(adapter.pairs, {**adapter.extra, "a.core": torch.eye(2)}, CoreMatrix())
    task = Task(adapter, frozenset(), frozenset(), personal=frozenset({"head"}))
    assert (task.shared(), task.own()) == (["a.core"], ["head.bias", "head.weight"])
    assert Task(adapter, frozen=frozenset("a")).trained() == ["head.bias", "head.weight"]
    back = Task.unpack(*task.pack()).adapter
    assert back.parametrization == CoreMatrix()
    assert back.digest() == adapter.digest() != Adapter(adapter.pairs, adapter.extra).digest()
