"""FedProx in effective space: the gradient of μ/2 ‖s B A − s B_t A_t‖², from r × r products alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outside_parametrizations import VeRA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fedlora as fl
from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.errors import ConfigError
from fedlora.models.parametrizations import LORA, CoreMatrix, DoRA, Parametrization, Sparse, composed
from fedlora.training.rules import FedProx, RoundStart

LAYERS = {"a": (7, 5), "b": (4, 9)}
Own = Callable[[tuple[int, int], int], dict[str, tuple[int, ...]]]
FORMS: dict[str, tuple[Parametrization, Own]] = {
    "lora": (LORA, lambda shape, rank: {}),
    "core": (CoreMatrix(), lambda shape, rank: {"core": (rank, rank)}),
    "dora": (DoRA(), lambda shape, rank: {"magnitude": shape[:1]}),
    "both": (
        composed(CoreMatrix(), DoRA()),
        lambda shape, rank: {"core": (rank, rank), "magnitude": shape[:1]},
    ),
}


def random(seed: int, ranks: Iterable[int], form: str = "lora") -> Adapter:
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    kind, own = FORMS[form]
    pairs, extra = dict[str, Pair](), {"head.weight": tensor(3, 2)}
    for (name, shape), rank in zip(LAYERS.items(), ranks, strict=True):
        pairs[name] = Pair(tensor(rank, shape[1]), tensor(shape[0], rank), 0.5 + rank)
        extra |= {f"{name}.{word}": tensor(*size) for word, size in own(shape, rank).items()}
    return Adapter(pairs, extra, kind)


def changes(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each layer adds to its weight, dense, and everything that is in no such change."""
    known = {**dict(adapter.tensors()), **tensors}
    found = {n: t for n, t in tensors.items() if n.endswith(("weight", "magnitude"))}
    for name, pair in adapter.pairs.items():
        core = known.get(f"{name}.core", torch.eye(pair.rank, dtype=torch.float64))
        found[name] = pair.scale * known[f"{name}.B"] @ core @ known[f"{name}.A"]
    return found


def terms(rule: FedProx, adapter: Adapter, start: dict[str, Tensor], now: dict[str, Tensor]) -> Any:
    return rule.term(RoundStart(adapter, start))(now)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 10)),
    st.sampled_from([*FORMS]),
    st.sampled_from(["", ".A", ".B"]),
    st.integers(0, 9),
)
def test_it_is_the_gradient_of_the_dense_distance(
    ranks: tuple[int, int], form: str, frozen: str, seed: int
) -> None:
    """At mixed ranks, r ≥ min(d) among them, with another form of the term and with a factor frozen."""
    adapter, moved = random(seed, ranks, form), dict(random(seed + 10, ranks, form).tensors())
    start = {n: t for n, t in adapter.tensors() if not (frozen and n.endswith(frozen))}
    now = {name: moved[name].clone().requires_grad_() for name in start}
    was = changes(adapter, start)
    pulled = sum((end - was[name]).square().sum() for name, end in changes(adapter, now).items())
    want = torch.autograd.grad(0.3 / 2 * pulled, list(now.values()))
    got = terms(FedProx(0.3, "effective"), adapter, start, {n: t.detach() for n, t in now.items()})
    assert got.keys() == now.keys()
    for name, grad in zip(now, want, strict=True):
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-10, msg=name)


def test_no_matrix_of_a_layer_s_size_is_ever_made() -> None:
    made: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            made.extend(tuple(t.shape) for t in ([found] if isinstance(found, Tensor) else found or ()))
            return found

    adapter = random(0, (2, 3), "core")
    start = dict(adapter.tensors())
    with Watch():
        term = FedProx(0.3, "effective").term(RoundStart(adapter, start))
        term({name: 2 * tensor for name, tensor in start.items()})
    assert (2, 5) in made
    assert (3, 3) in made
    assert not {*LAYERS.values()} & {*made}


def test_where_B_is_zero_the_factors_are_held_to_a_random_A_and_the_products_are_not() -> None:
    adapter = random(1, (2, 3))
    start = {n: torch.zeros_like(t) if n.endswith(".B") else t for n, t in adapter.tensors()}
    adapter = adapter.with_tensors(start)
    now = {name: tensor + 1 if name.endswith(".A") else tensor for name, tensor in start.items()}
    factors, products = (
        terms(FedProx(0.3, space), adapter, start, now) for space in ("factors", "effective")
    )
    for name in LAYERS:
        assert torch.allclose(factors[f"{name}.A"], torch.full_like(now[f"{name}.A"], 0.3))
        assert not products[f"{name}.A"].any()
        assert not products[f"{name}.B"].any()


def test_the_products_do_not_depend_on_how_they_are_split() -> None:
    """(c A, B / c) is the same model: the pull on it is the same change of the product, to first order."""
    adapter, moved = random(2, (2, 3)), dict(random(3, (2, 3)).tensors())

    def slope(space: Any, c: float) -> float:
        def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            ways = {"A": c, "B": 1 / c}
            return {name: t * ways.get(name.rpartition(".")[2], 1.0) for name, t in tensors.items()}

        start, now = split(dict(adapter.tensors())), split(moved)
        own = adapter.with_tensors(start)
        found = terms(FedProx(1.0, space), own, start, now)
        way = split({name: t - dict(adapter.tensors())[name] for name, t in moved.items()})
        return float(sum((found[name] * way[name]).sum() for name in now))

    assert slope("effective", 5.0) == pytest.approx(slope("effective", 1.0), rel=1e-9)
    assert slope("factors", 5.0) != pytest.approx(slope("factors", 1.0), rel=0.1)


@pytest.mark.parametrize("train", ["AB", "B"])
def test_clients_of_one_pass_are_held_each_to_its_own_products(bench: Any, train: str) -> None:
    client = replace(bench.client, steps=3, rules=(FedProx(0.2, "effective"),))
    work = [
        bench.work(Task(bench.start(2 + k, seed=k), train=frozenset(train)), client=k, rows=6 + k)
        for k in range(3)
    ]
    together = client.train(bench.base, work)
    free = replace(client, rules=()).train(bench.base, work)
    for one, other, job in zip(together, free, work, strict=True):
        [alone] = client.train(bench.base, [job])
        assert one.adapter.digest() != other.adapter.digest()
        for name, tensor in alone.adapter.tensors():
            torch.testing.assert_close(dict(one.adapter.tensors())[name], tensor, rtol=1e-9, atol=1e-12)


def test_sparse_values_are_their_own_products() -> None:
    adapter = Adapter({}, {"a.sparse": torch.ones(3)}, Sparse())
    start = {"a.sparse": torch.ones(3)}
    found = terms(FedProx(0.5, "effective"), adapter, start, {"a.sparse": torch.tensor([1.0, 2.0, 4.0])})
    assert found["a.sparse"].tolist() == [0.0, 0.5, 1.5]


def test_it_may_be_used_under_dp_sgd_and_a_form_that_hides_its_products_is_refused() -> None:
    held = FedProx(5.0, "effective")
    client = fl.clients.LocalTraining(lr=0.05, batch_size=4, rules=(held,))
    assert client.privately(fl.privacy.DPSGD(epsilon=6)).rules == (held,)  # type: ignore[attr-defined]
    adapter = Adapter({}, {"a.d": torch.ones(3), "a.b": torch.ones(2)}, VeRA())
    with pytest.raises(ConfigError, match=r"rule\.space=effective: the low-rank terms of VeRA follow from"):
        held.term(RoundStart(adapter, dict(adapter.tensors())))
    with pytest.raises(ConfigError, match=r"rule: FedProx holds the low-rank .*parametrization=VeRA"):
        fl.simulate("tiny", "tiny", rule=held, lora={"parametrization": VeRA()}, clients=2, progress=False)
    with pytest.raises(ConfigError, match=r"FedProx\.space: expected factors or effective, got 'both'"):
        FedProx(0.1, "both")  # type: ignore[arg-type]
