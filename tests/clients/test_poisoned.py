"""The poisoned client: who is malicious, what they send, and that everybody else trains as ever."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.clients import LocalTraining, PoisonedTraining
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import LoRA, fresh_adapter, targets
from fedlora.tasks import Instruction
from fedlora.training.client import TrainRequest

SEED = 5
LOCAL = LocalTraining(lr=0.01, batch_size=4, steps=2)


def client(kind: Any, share: float = 0.5, boost: float = 1.0, clients: int = 4) -> PoisonedTraining:
    return PoisonedTraining(LOCAL, kind, share, clients, boost)


@pytest.fixture
def assignments(base: Any) -> list[TrainRequest]:
    modules = targets(base, ["query", "value"])
    adapter = fresh_adapter(base, modules, LoRA().peer(0, 2, modules), base.heads)
    rows = [Example([5 + i % 7, 6, 7 + i % 3], i % 2) for i in range(12)]
    task = Task(adapter, share=frozenset("B"), train=frozenset("AB"))
    return [TrainRequest(k, 1, SEED, task, rows[k:]) for k in range(4)]


def tensors(outcome: Any) -> dict[str, torch.Tensor]:
    return dict(outcome.adapter.tensors())


def test_the_malicious_are_a_share_of_all_by_the_seed() -> None:
    for share, count in ((0.0, 0), (0.3, 3), (0.25, 2), (0.5, 5), (1.0, 10)):
        assert len(client("sign", share, clients=10).malicious(SEED)) == count
    some = client("sign", 0.3, clients=10)
    assert some.malicious(SEED) == some.malicious(SEED) == client("noise", 0.3, clients=10).malicious(SEED)
    assert len({some.malicious(seed) for seed in range(20)}) > 5
    assert client("sign", 0.2, clients=10).malicious(SEED) < some.malicious(SEED)


@pytest.mark.parametrize("kind", ["labels", "sign", "noise"])
def test_honest_clients_train_as_ever(base: Any, assignments: list[TrainRequest], kind: Any) -> None:
    poisoned = client(kind)
    evil = poisoned.malicious(SEED)
    assert 0 < len(evil) < 4
    for a, got, want in zip(
        assignments, poisoned.train(base, assignments), LOCAL.train(base, assignments), strict=True
    ):
        same = got.adapter.digest() == want.adapter.digest()
        assert same == (a.client not in evil)
    assert all(
        got.adapter.digest() == want.adapter.digest()
        for got, want in zip(
            client(kind, 0.0).train(base, assignments), LOCAL.train(base, assignments), strict=True
        )
    )


def test_wrong_labels_are_the_next_ones(base: Any, assignments: list[TrainRequest]) -> None:
    wrong = [
        replace(a, rows=[Example(r.input_ids, 1 - int(r.target)) for r in a.rows])  # type: ignore[arg-type]
        for a in assignments
    ]
    want = LOCAL.train(base, wrong)
    got = client("labels", 1.0).train(base, assignments)
    assert [o.adapter.digest() for o in got] == [o.adapter.digest() for o in want]


@pytest.mark.parametrize("boost", [1.0, 5.0])
def test_a_turned_sign_is_the_honest_change_backwards(
    base: Any, assignments: list[TrainRequest], boost: float
) -> None:
    honest = LOCAL.train(base, assignments)
    for a, got, want in zip(
        assignments, client("sign", 1.0, boost).train(base, assignments), honest, strict=True
    ):
        start, sent, trained = dict(a.start.tensors()), tensors(got), tensors(want)
        for name in a.task.shared():
            assert torch.allclose(
                sent[name] - start[name], -boost * (trained[name] - start[name]), rtol=1e-4, atol=1e-6
            )
        for name in trained.keys() - set(a.task.shared()):
            assert torch.equal(sent[name], trained[name])


def test_noise_is_as_long_as_the_change_and_repeats(base: Any, assignments: list[TrainRequest]) -> None:
    honest, poisoned = LOCAL.train(base, assignments), client("noise", 1.0, 3.0)
    first, again = poisoned.train(base, assignments), poisoned.train(base, assignments)
    for a, got, same, want in zip(assignments, first, again, honest, strict=True):
        start, sent, trained = dict(a.start.tensors()), tensors(got), tensors(want)
        assert got.adapter.digest() == same.adapter.digest()
        for name in a.task.shared():
            change, noise = trained[name] - start[name], sent[name] - start[name]
            assert float(noise.norm()) == pytest.approx(3 * float(change.norm()), rel=1e-4)
            assert not torch.allclose(noise, 3 * change)


def test_labels_need_a_task_with_labels(base: Any, assignments: list[TrainRequest]) -> None:
    with pytest.raises(ConfigError, match=r"client.kind: 'labels' needs a classification task"):
        client("labels").train(replace(base, task=Instruction()), assignments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "flip"), ("share", -0.1), ("share", 1.5), ("clients", 0), ("clients", None), ("boost", 0.0)],
)
def test_settings_that_cannot_be_are_refused_by_name(name: str, value: Any) -> None:
    settings = {"kind": "sign", "share": 0.3, "clients": 4, "boost": 1.0} | {name: value}
    with pytest.raises(ConfigError, match=rf"client.{name}: expected"):
        PoisonedTraining(LOCAL, **settings)
