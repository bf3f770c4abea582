"""FedProx holds a client near where it began, by the gradient of the loss that the paper writes."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.errors import ConfigError
from fedlora.training.rules import FedProx


def distance(one: Adapter, other: Adapter) -> float:
    after = dict(other.tensors())
    return float(torch.stack([(t - after[n]).norm() for n, t in one.tensors()]).norm())


def test_its_term_is_the_gradient_of_the_written_loss(make: Any, rng: Any) -> None:
    start = dict(make.adapter(rng, {"a": (4, 3), "b": (2, 5)}, 2).tensors())
    now = {n: (t + make.tensor(rng, *t.shape)).requires_grad_() for n, t in start.items()}
    loss = 0.3 / 2 * sum((tensor - start[name]).square().sum() for name, tensor in now.items())
    loss.backward()
    term = FedProx(0.3).gradient({n: t.detach() for n, t in now.items()}, start)
    assert term.keys() == start.keys()
    for name, tensor in now.items():
        torch.testing.assert_close(term[name], tensor.grad, rtol=1e-12, atol=0)


def test_two_steps_are_those_of_the_loss_with_the_term(bench: Any) -> None:
    """The second of two plain steps differs by lr · μ · (w_1 − w_0), whatever the loss is."""
    task = Task(bench.start())
    client, mu = replace(bench.client, steps=2, lr=0.1), 0.7
    one = bench.train(task, replace(client, steps=1))
    free, held = bench.train(task, client), bench.train(task, replace(client, rules=(FedProx(mu),)))
    first, after, start = dict(one.tensors()), dict(held.tensors()), dict(task.adapter.tensors())
    assert bench.train(task, replace(client, steps=1, rules=(FedProx(mu),))).digest() == one.digest()
    for name, tensor in free.tensors():
        want = tensor - 0.1 * mu * (first[name] - start[name])
        assert not torch.equal(want, tensor)
        torch.testing.assert_close(after[name], want, rtol=1e-9, atol=1e-12)


def test_as_mu_grows_a_client_stays_where_it_began(bench: Any) -> None:
    """In the same time, lr · steps: the distance falls as 1 / μ, where without the rule it stays."""
    task, free, held = Task(bench.start()), [], []
    for steps in (8, 32, 128):
        client = replace(bench.client, steps=steps, lr=0.8 / steps)
        free.append(distance(task.adapter, bench.train(task, client)))
        stiff = replace(client, rules=(FedProx(0.5 / client.lr),))
        held.append(distance(task.adapter, bench.train(task, stiff)))
    assert min(free) > 0.7 * max(free)
    assert all(0.15 < after / before < 0.4 for before, after in pairwise(held))


def test_clients_of_one_pass_are_held_each_to_its_own_start_and_mu(bench: Any) -> None:
    """Mixed ranks, heads and factors, in one pass and one by one; a client without the rule is not held."""
    rules: list[tuple[FedProx, ...]] = [(FedProx(0.5),), (), (FedProx(2.0),)]
    client = replace(bench.client, steps=3, rules=(FedProx(0.1),))
    work = [
        bench.work(Task(bench.start(2 + k, seed=k), method=rule), client=k, rows=6 + k)
        for k, rule in enumerate(rules)
    ]
    together = client.train(bench.base, work)
    for one, job, rule in zip(together, work, rules, strict=True):
        [alone] = client.train(bench.base, [job])
        mu = 0.1 + sum(r.mu for r in rule)
        plain = replace(job, task=replace(job.task, method=()))
        [same] = replace(client, rules=(FedProx(mu),)).train(bench.base, [plain])
        for name, tensor in alone.adapter.tensors():
            for other in (one, same):
                torch.testing.assert_close(dict(other.adapter.tensors())[name], tensor, rtol=1e-9, atol=1e-12)


def test_an_own_part_is_held_to_where_the_client_has_it(bench: Any) -> None:
    task = Task(bench.start(seed=1), share=frozenset("A"))
    memory = {name: t + 1 for name, t in task.adapter.tensors() if name.endswith(".B")}
    work = replace(bench.work(task), memory=memory)
    stiff = replace(bench.client, steps=60, lr=1e-3, rules=(FedProx(900.0),))
    kept = stiff.train(bench.base, [work])[0].memory
    assert kept.keys() == memory.keys()
    assert all(float((kept[name] - memory[name]).abs().max()) < 0.02 for name in kept)


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_mu_that_cannot_be_is_refused(mu: float) -> None:
    with pytest.raises(ConfigError, match=r"FedProx\.mu: expected a number of at least 0"):
        FedProx(mu)
