from collections.abc import Sequence
from typing import Any

import pytest
from flwr.app import Message

from fedlora.core.messages import Task
from fedlora.errors import ConfigError
from fedlora.rounds.aggregation.base import choose
from fedlora.rounds.round_config import RoundConfig
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA


def test_sampling_is_seeded_without_replacement_and_in_client_order(lab: Any) -> None:
    ran = lab.run(FedIT(), [4] * 10, rounds=6, clients_per_round=4)
    rounds = ran.sampled()
    assert rounds == lab.run(FedIT(), [4] * 10, rounds=6, clients_per_round=4).sampled()
    assert all(len({*clients}) == 4 and clients == sorted(clients) for clients in rounds)
    assert len({tuple(clients) for clients in rounds}) > 3
    assert {c for clients in rounds for c in clients} == set(range(10))
    assert rounds != lab.run(FedIT(), [4] * 10, rounds=6, clients_per_round=4, seed=1).sampled()


def test_the_chosen_nodes_keep_their_order() -> None:
    for round_number in range(1, 9):
        found = choose(list(range(20)), 7, 3, round_number)
        assert found == sorted(set(found))
        assert len(found) == 7


@pytest.mark.parametrize("wanted", [None, 3, 4, 1000])
def test_asking_for_as_many_clients_as_there_are_or_more_takes_all(lab: Any, wanted: int | None) -> None:
    assert lab.run(FedIT(), [4] * 3, clients_per_round=wanted).sampled() == [[0, 1, 2]] * 2


def test_weights_are_examples_or_uniform(lab: Any) -> None:
    """With A as it was sent and B = 0 at the start, FFA-LoRA's B is the weighted mean of their noise."""
    alone = [lab.run(FFALoRA(), [4] * 2, rounds=1, change=lab.keep(c)) for c in (0, 1)]
    first, second = (r.federation.state.adapter.pairs["a.q"].B for r in alone)
    ran = lab.run(FFALoRA(), [4] * 2, rounds=1)  # 10 and 20 rows
    assert ran.federation.state.adapter.pairs["a.q"].B.allclose((10 * first + 20 * second) / 30, atol=1e-6)
    ran = lab.run(FFALoRA(), [4] * 2, rounds=1, weights="uniform")
    assert ran.federation.state.adapter.pairs["a.q"].B.allclose((first + second) / 2, atol=1e-6)
    assert [line["examples"] for line in ran.lines("clients.jsonl")] == [10, 20]


def test_too_few_updates_leave_the_state(lab: Any, noise: Any) -> None:
    ran = lab.run(FedIT(), client=noise(failing=frozenset({0, 2})), min_updates=2)
    assert ran.digest == lab.adapter().digest()
    assert ran.federation.state.round == 0
    assert "1 good updates, 2 needed" in ran.text
    assert [(m["clients"], m["dropped"]) for m in ran.lines("metrics.jsonl")] == [(1, 2)] * 2
    assert "aggregation_error" not in ran.lines("metrics.jsonl")[0]
    moved = lab.run(FedIT(), client=noise(failing=frozenset({2})), min_updates=2)
    assert moved.digest != lab.adapter().digest()


def test_a_round_without_any_update_is_recorded(lab: Any, noise: Any) -> None:
    ran = lab.run(FedIT(), client=noise(failing=frozenset({0, 1, 2})), evaluate_updates=True)
    assert [(m["round"], m["clients"], m["train_loss"]) for m in ran.lines("metrics.jsonl")] == [
        (1, 0, None),
        (2, 0, None),
    ]
    assert ran.digest == lab.adapter().digest()


@pytest.mark.parametrize(
    ("every", "rounds", "expected"),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (3, 3, [3]), (9, 2, [2]), (0, 2, [])],
)
def test_when_the_server_evaluates(lab: Any, every: int, rounds: int, expected: list[int]) -> None:
    ran = lab.run(FedIT(), rounds=rounds, evaluate_every=every)
    assert [m["round"] for m in ran.lines("metrics.jsonl") if "accuracy" in m] == expected


def test_each_update_can_be_evaluated_by_itself(lab: Any, noise: Any) -> None:
    seen: list[int] = []

    def score(tasks: Sequence[Task]) -> list[tuple[float, float]]:
        seen.append(len(tasks))
        return [(0.0, i / 10) for i, _ in enumerate(tasks)]

    client = noise(failing=frozenset({1}))
    ran = lab.run(FedIT(), rounds=1, client=client, evaluate=score, evaluate_updates=True)
    assert seen == [2, 1]
    found = [(x["client"], x.get("test_accuracy")) for x in ran.lines("clients.jsonl")]
    assert found == [(0, 0.0), (1, None), (2, 0.1)]


def test_a_node_that_fails_to_say_who_it_is_takes_no_part(lab: Any, noise: Any) -> None:
    site = type(lab.site(noise()))
    profile = site.profile

    def shy(self: Any, message: Message, context: Any) -> Message:
        if context.node_config["client"] == 1:
            raise RuntimeError("shy")
        return profile(self, message, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "profile", shy)
        ran = lab.run(FedIT())
    assert ran.sampled() == [[0, 2]] * 2
    assert "cannot take part" in ran.text


@pytest.mark.parametrize("strategy", [FedIT(), FFALoRA(), FlexLoRA()], ids=lambda s: type(s).__name__)
def test_the_result_follows_the_seed_alone(lab: Any, strategy: Any) -> None:
    one = lab.run(strategy, [4] * 5, rounds=3, clients_per_round=3, fuse=1)
    two = lab.run(strategy, [4] * 5, rounds=3, clients_per_round=3, fuse=3)
    other = lab.run(strategy, [4] * 5, rounds=3, clients_per_round=3, seed=1)
    assert one.digest == two.digest != other.digest


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"seed": -1},
        {"clients_per_round": 0},
        {"min_updates": 0},
        {"weights": "size"},
        {"evaluate_every": -1},
    ],
)
def test_rules_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("evaluate_", "evaluate.")):
        RoundConfig(**({"rounds": 1, "seed": 0} | wrong))
