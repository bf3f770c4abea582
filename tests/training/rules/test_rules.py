"""A rule of an author's own, by public names alone: in the trainer, in a run, and under privacy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedlora as fl
from fedlora.errors import ConfigError
from fedlora.training.rules import FedProx, LocalRule, RankPruning


@dataclass(frozen=True)
class Decay(LocalRule):
    """Pulls the factors to zero, and halves the head at the end."""

    rate: float

    def gradient(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.rate * t for name, t in tensors.items() if name.endswith((".A", ".B"))}

    def finish(self, trained: fl.Adapter, start: fl.Adapter) -> fl.Adapter:
        return trained.with_tensors({name: t / 2 for name, t in trained.extra.items()})


@dataclass(frozen=True)
class Wrong(LocalRule):
    """A rule with a mistake."""

    name: str

    def gradient(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.zeros(7)}


@dataclass(frozen=True)
class Decaying(fl.Strategy):
    """FlexLoRA whose task brings the rule, as an author writes it."""

    mixed_ranks = True
    linear = False
    exact = True
    products = True

    def task(self, state: fl.State, peer: fl.Peer) -> fl.Task:
        return replace(fl.strategies.FlexLoRA().task(state, peer), method=(Decay(0.3), FedProx(0.1)))

    def aggregate(self, state: fl.State, updates: Sequence[fl.Update], rng: np.random.Generator) -> fl.State:
        return fl.strategies.FlexLoRA().aggregate(state, updates, rng)


def test_a_rule_s_term_is_added_and_its_last_word_is_the_result(bench: Any) -> None:
    task = fl.Task(bench.start(3))
    free = bench.train(task, replace(bench.client, steps=1))
    ruled = dict(bench.train(task, replace(bench.client, steps=1, rules=(Decay(0.3),))).tensors())
    start = dict(task.adapter.tensors())
    for name, tensor in free.tensors():
        factor = name in {f"{m}.{f}" for m in task.adapter.pairs for f in "AB"}
        want = tensor - bench.client.lr * 0.3 * start[name] if factor else tensor / 2
        torch.testing.assert_close(ruled[name], want, rtol=1e-9, atol=1e-12)


def test_the_strategy_s_rules_come_first_and_the_user_s_after_them(bench: Any) -> None:
    said: list[str] = []

    @dataclass(frozen=True)
    class Said(LocalRule):
        word: str

        def finish(self, trained: fl.Adapter, start: fl.Adapter) -> fl.Adapter:
            said.append(self.word)
            assert start.digest() == task.adapter.digest()
            return trained

    task = fl.Task(bench.start(), method=(Said("strategy"),))
    client = bench.client.with_rules((Said("first"),)).with_rules((Said("second"),))
    bench.train(task, client)
    assert said == ["strategy", "first", "second"]


def run(**more: Any) -> fl.Run:
    settings = {"clients": 3, "ranks": [2, 4], "rounds": 2, "progress": False, "strategy": "flexlora"}
    return fl.simulate("tiny", "tiny", **settings | more)


def test_a_strategy_s_rule_travels_to_clients_of_mixed_ranks_and_does_what_the_user_s_does() -> None:
    lr = fl.clients.LocalTraining(lr=0.05)
    brought = run(strategy=Decaying(), client=lr)
    given = run(client=replace(lr, rules=(Decay(0.3), FedProx(0.1))))
    without = run(client=lr)
    assert brought.adapter.digest() == given.adapter.digest() != without.adapter.digest()
    assert all(line["status"] == "ok" for line in brought.clients)


@pytest.mark.parametrize("name", ["nowhere.A", "classifier.weight"])
def test_a_term_that_fits_nothing_is_refused_by_the_name_of_the_rule(bench: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rule Wrong: expected terms .* got \(7,\) for '{name}'"):
        bench.train(fl.Task(bench.start()), replace(bench.client, rules=(Wrong(name),)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([RankPruning(0.5, 0.1, 1)], "RankPruning changes ranks, which the server has to expect"),
        ([FedProx], "expected local rules, got a type"),
        (["fedprox"], "expected local rules, got a str"),
    ],
)
def test_what_a_user_cannot_add_is_refused_in_one_line(rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"client.rules: {message}"):
        fl.clients.LocalTraining(lr=0.1, rules=rules)


def test_clients_of_other_steps_refuse_rules_and_wrappers_hand_them_on() -> None:
    local, rule = fl.clients.LocalTraining(lr=0.1), FedProx(0.5)
    for client in (fl.clients.GatedExperts(local), fl.clients.TwoPhase(local)):
        with pytest.raises(ConfigError, match=rf"rule: client {type(client).__name__} .* got FedProx"):
            client.with_rules((rule,))
    for client in (fl.clients.SlicedTraining(local, 1), fl.clients.PoisonedTraining(local, "sign", 0.5, 2)):
        assert client.with_rules((rule,)).local.rules == (rule,)  # type: ignore[attr-defined]


def test_steps_on_a_loss_of_their_own_do_not_drop_rules_in_silence(bench: Any) -> None:
    client = replace(bench.client, rules=(FedProx(0.5),))
    with pytest.raises(ConfigError, match="follow no local rule, got FedProx"):
        client.descend(bench.base, {}, lambda rows: torch.zeros(len(rows)), [])


# --- under differential privacy of records ------------------------------------------------------------------

PRIVATE = {"privacy": fl.privacy.DPSGD(epsilon=6, insecure_test_seed=1), "strategy": "ffalora", "ranks": 4}


def test_a_rule_that_may_know_of_rows_is_refused_under_dp_sgd_and_the_message_names_those_that_do_not() -> (
    None
):
    client = fl.clients.LocalTraining(lr=0.05, batch_size=4)
    message = "the term that Decay adds .* use FedProx or RankPruning, set independent_of_rows"
    with pytest.raises(ConfigError, match=message):
        replace(client, rules=(Decay(0.1),)).privately(fl.privacy.DPSGD(epsilon=6))
    with pytest.raises(ConfigError, match=message):
        run(**PRIVATE, client=replace(client, rules=(Decay(0.1),)))
    with pytest.raises(ConfigError, match=message):  # before the first round, so that nobody pays
        run(**PRIVATE | {"strategy": Decaying(), "ranks": [2, 4]}, client=client)


def test_fedprox_under_dp_sgd_is_added_to_the_noised_step() -> None:
    client = fl.clients.LocalTraining(lr=0.05, batch_size=4)
    plain, held = run(**PRIVATE, client=client), run(**PRIVATE, client=replace(client, rules=(FedProx(5.0),)))
    assert plain.summary["ledger"] == held.summary["ledger"]
    start, frozen = ({n: t for n, t in r.adapter.tensors()} for r in (plain, held))
    assert any(not torch.equal(start[name], frozen[name]) for name in start)
