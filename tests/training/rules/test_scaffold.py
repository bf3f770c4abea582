"""SCAFFOLD against a plain implementation of the paper's algorithm in float64, and what holds it together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedlora as fl
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.errors import CheckpointError, ConfigError
from fedlora.strategies import FedIT, FFALoRA
from fedlora.training.client import TrainRequest
from fedlora.training.rules import RoundEnd, RoundStart, Scaffold, ServerMemory

Tensors = dict[str, Tensor]
Gradient = Callable[[int, Tensors], Tensors]  # a client's, at what it trains


def shapes(task: Task) -> dict[str, tuple[int, ...]]:
    return {name: tuple(dict(task.adapter.tensors())[name].shape) for name in task.shared()}


@dataclass
class Federation:
    """Clients and a server that pass on what the rule says; nothing of the rule is computed here.

    Args:
        strategy: the algorithm.
        adapter: the start.
        ranks: of the clients.
        train: a client's round: (client, task, memory) -> its adapter, memory and what it sends.
    """

    strategy: fl.Strategy
    adapter: Adapter
    ranks: Sequence[int]
    train: Callable[[int, Task, Mapping[str, Tensor]], Any]
    known: Mapping[str, Tensor] = field(default_factory=dict)
    memories: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.strategy.init(self.adapter)

    @property
    def memory(self) -> ServerMemory:
        tasks = [self.strategy.task(self.state, Peer(0, rank)) for rank in self.ranks]
        return ServerMemory(self.state.round, self.known, [(shapes(task), 1) for task in tasks])

    def round(self, sampled: Sequence[int], lost: Sequence[int] = ()) -> None:
        updates = []
        for client in sampled:
            peer = Peer(client, self.ranks[client])
            task = self.strategy.task(self.state, peer)
            task = replace(task, method=(Scaffold().ask(self.memory, task, peer),))
            adapter, self.memories[client], sent = self.train(client, task, self.memories.get(client, {}))
            if client not in lost:
                updates.append(Update(adapter, 1.0, peer, version=self.state.round, sent=sent))
        self.known = Scaffold().learn(self.memory, updates)
        self.state = self.strategy.aggregate(self.state, updates, np.random.default_rng(0))


def by_gradient(gradient: Gradient, rate: float, steps: Callable[[int], int]) -> Any:
    """A client's plain steps with the rule's term."""

    def train(client: int, task: Task, memory: Mapping[str, Tensor]) -> Any:
        (rule,) = task.method
        start = {name: dict(task.adapter.tensors())[name] for name in task.trained()}
        term, y = rule.term(RoundStart(task.adapter, start, memory)), dict(start)  # type: ignore[attr-defined]
        for _ in range(steps(client)):
            added, own = term(y), gradient(client, y)
            y = {n: t - rate * (own[n] + added.get(n, torch.zeros(()))) for n, t in y.items()}
        trained = task.adapter.with_tensors(y)
        left = rule.end(  # type: ignore[attr-defined]
            RoundEnd(task.adapter, trained, steps(client), dict.fromkeys(start, rate), memory)
        )
        return trained, left.memory, left.sent

    return train


class Dense:
    """The paper's algorithm 1 with option II, on one vector; `holds` is 1 where a client has the number."""

    def __init__(self, x: np.ndarray, holds: np.ndarray, gradient: Any, rate: float, steps: Any) -> None:
        self.x, self.holds, self.gradient, self.rate, self.steps = x, holds, gradient, rate, steps
        self.c, self.own = np.zeros_like(x), np.zeros((len(holds), len(x)))

    def round(self, sampled: Sequence[int], lost: Sequence[int] = ()) -> None:
        ends, changes = np.zeros_like(self.x), np.zeros_like(self.x)
        for k in sampled:
            has = self.holds[k]
            x = y = has * self.x
            for _ in range(self.steps(k)):
                y = y - self.rate * has * (self.gradient(k, y) - self.own[k] + self.c)
            new = self.own[k] - self.c + (x - y) / (self.steps(k) * self.rate)
            if k not in lost:
                ends += has * y / (len(sampled) - len(lost))
                changes += has * (new - self.own[k])
                self.own[k] = has * new
        self.x = ends
        self.c = self.c + changes / self.holds.sum(0).clip(1)


D_OUT, D_IN, RATE = 4, 3, 0.05
RANKS = (1, 2, 3, 3, 2)
FULL = [[0, 1, 2, 3, 4]] * 5
PARTLY = [[0, 1, 2], [2, 4], [0, 3, 4], [1, 2, 3], [0, 1, 2, 3, 4], [3]]


def quadratic(rank: int = 3) -> tuple[Adapter, Any, np.ndarray]:
    """½ (w − m_k)ᵀ H_k (w − m_k) of all of B at its largest rank and of a head, by client."""
    rng = np.random.default_rng(3)
    size = D_OUT * rank + 2
    means = rng.standard_normal((len(RANKS), size))
    roots = rng.standard_normal((len(RANKS), size, size)) / size**0.5
    pair = Pair(torch.from_numpy(rng.standard_normal((rank, D_IN))), torch.zeros(D_OUT, rank).double(), 2.0)
    adapter = Adapter({"m": pair}, {"head": torch.from_numpy(rng.standard_normal(2))})
    held = np.zeros((len(RANKS), D_OUT, rank))
    for k, r in enumerate(RANKS):
        held[k, :, :r] = 1
    holds = np.concatenate([held.reshape(len(RANKS), -1), np.ones((len(RANKS), 2))], axis=1)

    def gradient(k: int, w: np.ndarray) -> np.ndarray:
        return roots[k].T @ roots[k] @ (w - means[k])

    return adapter, gradient, holds


def flat(tensors: Mapping[str, Tensor], rank: int = 3) -> np.ndarray:
    B = torch.zeros(D_OUT, rank).double()
    B[:, : tensors["m.B"].shape[1]] = tensors["m.B"]
    return torch.cat([B.reshape(-1), tensors["head"]]).numpy()


def cut(w: np.ndarray, like: Mapping[str, Tensor], rank: int = 3) -> Tensors:
    B, r = torch.from_numpy(w[: D_OUT * rank].reshape(D_OUT, rank)), like["m.B"].shape[1]
    return {"m.B": B[:, :r].clone(), "head": torch.from_numpy(w[D_OUT * rank :].copy())}


def pair_of(rounds_steps: Callable[[int], int]) -> tuple[Federation, Dense]:
    adapter, gradient, holds = quadratic()
    train = by_gradient(lambda k, y: cut(gradient(k, flat(y)), y), RATE, rounds_steps)
    x = flat(dict(adapter.tensors()))
    return Federation(FFALoRA(), adapter, RANKS, train), Dense(x, holds, gradient, RATE, rounds_steps)


@pytest.mark.parametrize("rounds", [FULL, PARTLY], ids=["all take part", "some take part"])
@pytest.mark.parametrize("lost", [(), (2,)], ids=["none lost", "answers of client 2 lost in odd rounds"])
def test_it_is_the_paper_s_algorithm_on_quadratics_of_mixed_ranks(rounds: Any, lost: Any) -> None:
    """Each number's c is the mean over the clients that hold it; a lost answer changes no c and no c_k."""
    ours, paper = pair_of(lambda k: 2 + k)
    for at, sampled in enumerate(rounds):
        gone = [k for k in sampled if k in lost and at % 2 == 0 and len(sampled) > 1]
        ours.round(sampled, gone)
        paper.round(sampled, gone)
        np.testing.assert_allclose(flat(dict(ours.state.adapter.tensors())), paper.x, rtol=1e-12, atol=1e-13)
        wide = ours.strategy.task(ours.state, Peer(0, 3))
        c = flat(Scaffold().ask(ours.memory, wide, Peer(0, 3)).common)
        np.testing.assert_allclose(c, paper.c, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(c, paper.own.sum(0) / paper.holds.sum(0), rtol=1e-11, atol=1e-12)


def test_it_reaches_the_optimum_of_the_mean_where_plain_averaging_does_not() -> None:
    adapter, gradient, _ = quadratic()
    ranks, steps = (3,) * 5, lambda k: 5
    at = {name: t for name, t in adapter.tensors() if name != "m.A"}

    def slope(state: State) -> float:
        w = flat(dict(state.adapter.tensors()))
        return float(np.linalg.norm(sum(gradient(k, w) for k in range(5)) / 5))

    ours = Federation(
        FFALoRA(), adapter, ranks, by_gradient(lambda k, y: cut(gradient(k, flat(y)), y), 4 * RATE, steps)
    )
    plain = flat(at)
    for _ in range(150):
        ours.round(range(5))
        ends = []
        for k in range(5):
            y = plain
            for _ in range(5):
                y = y - 4 * RATE * gradient(k, y)
            ends.append(y)
        plain = np.mean(ends, axis=0)
    assert slope(ours.state) < 1e-6
    assert float(np.linalg.norm(sum(gradient(k, plain) for k in range(5)) / 5)) > 1e-2


def test_with_all_clients_and_one_step_a_round_the_mean_step_is_that_of_plain_averaging() -> None:
    """Σ_k (c_k − c) = 0."""
    adapter, gradient, _ = quadratic()
    ours = Federation(
        FFALoRA(),
        adapter,
        (3,) * 5,
        by_gradient(lambda k, y: cut(gradient(k, flat(y)), y), RATE, lambda k: 1),
    )
    plain = flat(dict(adapter.tensors()))
    for _ in range(6):
        ours.round(range(5))
        plain = plain - RATE * sum(gradient(k, plain) for k in range(5)) / 5
        np.testing.assert_allclose(flat(dict(ours.state.adapter.tensors())), plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strategy", [FFALoRA(), FedIT()], ids=lambda s: type(s).__name__)
def test_it_is_the_paper_s_algorithm_on_a_model(bench: Any, strategy: fl.Strategy) -> None:
    """Factors and head of the tiny model; the reference's gradient is a plain step of rate 1."""
    client = replace(bench.client, lr=0.2, head_lr=0.05, batch_size=16, steps=2)
    oracle = replace(client, lr=1.0, head_lr=1.0, steps=1)
    rows = [bench.rows(6 + k, k) for k in range(3)]
    start = bench.start(2)

    def train(k: int, task: Task, memory: Mapping[str, Tensor]) -> Any:
        done = client.train(bench.base, [TrainRequest(k, 1, 0, task, rows[k], memory)])[0]
        return done.adapter, done.memory, {n.removeprefix("0/"): t for n, t in done.sent.items()}

    ours = Federation(strategy, start, (2,) * 3, train)
    start = ours.state.adapter
    x, names = dict(start.tensors()), strategy.task(ours.state, Peer(0, 2)).trained()
    rates = {n: 0.2 if n.endswith((".A", ".B")) else 0.05 for n in names}
    zeros = {n: torch.zeros_like(x[n]) for n in names}
    c, own = dict(zeros), [dict(zeros) for _ in range(3)]

    def gradient(k: int, at: Tensors) -> Tensors:
        task = replace(strategy.task(ours.state, Peer(k, 2)), adapter=start.with_tensors(at))
        moved = oracle.train(bench.base, [TrainRequest(k, 1, 0, task, rows[k])])[0].adapter
        return {n: at[n] - dict(moved.tensors())[n] for n in names}

    for sampled in ([0, 1, 2], [0, 2], [0, 1, 2]):
        ends, changes = [], []
        for k in sampled:
            y = dict(x)
            for _ in range(2):
                g = gradient(k, y)
                y |= {n: y[n] - rates[n] * (g[n] - own[k][n] + c[n]) for n in names}
            new = {n: own[k][n] - c[n] + (x[n] - y[n]) / (2 * rates[n]) for n in names}
            changes.append({n: new[n] - own[k][n] for n in names})
            ends.append(y)
            own[k] = new
        ours.round(sampled)
        x |= {n: sum(y[n] for y in ends) / len(ends) for n in names}
        c = {n: c[n] + len(sampled) / 3 * sum(d[n] for d in changes) / len(sampled) for n in names}
        got = dict(ours.state.adapter.tensors())
        for name in names:
            torch.testing.assert_close(got[name], x[name], rtol=1e-8, atol=1e-10, msg=name)


def test_clients_of_one_pass_remember_and_send_each_what_it_would_alone(bench: Any) -> None:
    client = replace(bench.client, steps=2)
    work = []
    for k in range(3):
        start = bench.start(2 + k, seed=k)
        c = {n: torch.full_like(t, 0.01 * (k + 1)) for n, t in start.tensors()}
        memory = {f"0/next/{n}": -t for n, t in c.items()} | {"0/answered": torch.tensor([-1, 4])}
        asked = Scaffold().ask(ServerMemory(5, {}, []), Task(start), Peer(k, 2 + k))
        task = Task(start, method=(replace(asked, common=c, counted=4),))
        work.append(replace(bench.work(task, client=k, rows=6 + k), memory=memory))
    for one, job in zip(client.train(bench.base, work), work, strict=True):
        [alone] = client.train(bench.base, [job])
        for mine, other in ((one.sent, alone.sent), (one.memory, alone.memory)):
            assert mine.keys() == other.keys()
            for name, tensor in mine.items():
                torch.testing.assert_close(tensor, other[name], rtol=1e-9, atol=1e-12)
        kept = {name.split("/")[1] for name in one.memory}
        assert kept == {"own", "next", "answered"}
        assert one.memory["0/answered"].tolist() == [4, 5]


def test_a_client_that_has_lost_what_the_server_counts_on_says_so() -> None:
    rule = replace(Scaffold().ask(ServerMemory(7, {}, []), Task(Adapter({})), Peer(0, 1)), counted=3)
    for memory in ({}, {"answered": torch.tensor([1, 2])}):
        with pytest.raises(CheckpointError, match="lacks the control variate that it had after round 4"):
            rule.term(RoundStart(Adapter({}), {}, memory))


def test_a_client_without_rows_sends_zeros(bench: Any) -> None:
    task = Task(bench.start())
    task = replace(task, method=(Scaffold().ask(ServerMemory(0, {}, []), task, Peer(1, 2)),))
    [done] = bench.client.train(bench.base, [bench.work(task, rows=0)])
    assert not any(tensor.any() for tensor in done.sent.values())
    assert done.adapter.digest() == task.adapter.digest()


def test_it_belongs_to_a_run_and_not_to_a_client() -> None:
    with pytest.raises(ConfigError, match=r"client\.rules: Scaffold has a half at the server"):
        fl.clients.LocalTraining(lr=0.1, rules=(Scaffold(),))
