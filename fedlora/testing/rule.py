"""The promises of a local rule, each a check of its own, and one call that tries them all.

    from fedlora.testing import check_rule

    check_rule(MyRule(rate=0.1))

The checks train clients of two ranks on the tiny random encoder (`model=tiny`), in float64.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlora.clients import LocalTraining
from fedlora.config.instantiate import Trust, make, received
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base, LoRA, fresh_adapter, load, targets
from fedlora.models.packaged import tiny
from fedlora.tasks import Classification
from fedlora.testing.promises import Broken, broken_of, report
from fedlora.training.client import TrainRequest
from fedlora.training.rules.base import LocalRule, check_private

CLOSE = 1e-7  # relative; the model computes in float64
RANKS = (2, 2, 5)  # of the clients
CLIENT = LocalTraining(lr=0.05, batch_size=4, steps=3, optimizer=partial(torch.optim.SGD))
PLAIN = (bool, int, float, str, type(None))  # values that a command line can name
Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Tried:
    """A rule, and clients that train with it.

    Args:
        rule: what is checked.
        base: the model.
        starts: the adapter with which each client begins its round.
        moved: the same, every tensor moved by something.
        seed: of the rows.
    """

    rule: LocalRule
    base: Base
    starts: Sequence[Adapter]
    moved: Sequence[Adapter]
    seed: int

    def train(self, rule: LocalRule, *clients: int, text: int = 0) -> list[Adapter]:
        """The adapters of clients after a round in one pass, all with the one rule, on the rows of `text`."""
        work = [
            TrainRequest(
                client, 1, self.seed, Task(self.starts[client], method=(rule,)), self.rows(client, text)
            )
            for client in clients
        ]
        return [result.adapter for result in CLIENT.train(self.base, work)]

    def rows(self, client: int, text: int) -> list[Example]:
        """A client's rows, others for every `text`."""
        rng = np.random.default_rng([self.seed, client, text])
        return [Example(rng.integers(2, 200, 3 + (i + text) % 5).tolist(), i % 3) for i in range(8 + client)]

    def terms(self, client: int) -> dict[str, Tensor]:
        """What the rule adds where a client has moved."""
        return dict(
            self.rule.gradient(dict(self.moved[client].tensors()), dict(self.starts[client].tensors()))
        )

    def ends(self, client: int) -> list[Adapter]:
        """The rule's last word on an adapter that has moved, and on one that has got smaller."""
        start = self.starts[client]
        smaller = start.with_tensors({name: 0.5 * tensor for name, tensor in start.tensors()})
        return [self.rule.finish(trained, start) for trained in (self.moved[client], smaller)]


def check_rule(rule: LocalRule, seed: int = 0) -> None:
    """Try every promise on a local rule.

    Args:
        rule: an instance, with the settings that are to be checked. Its class stands at the top of a module.
        seed: of the adapters and rows on which it is tried.

    Raises:
        AssertionError: some promises are broken; a line names each and says what came.
    """
    report(type(rule).__name__, broken(rule, seed))


def broken(rule: LocalRule, seed: int = 0) -> Iterator[tuple[str, str]]:
    """The promises that a rule breaks: the name of each, and what came."""
    one = tried(rule, seed)
    yield from broken_of(PROMISES, one)


def tried(rule: LocalRule, seed: int = 0) -> Tried:
    """The rule beside the tiny model, and clients whose factors are all off zero."""
    base = load(tiny(), Classification(), ("x", "y", "z"))
    base.model.double()
    modules = targets(base, ["query", "dense"])

    def random(adapter: Adapter, *stream: int) -> Adapter:
        rng = np.random.default_rng([seed, *stream])
        return adapter.with_tensors(
            {
                name: torch.from_numpy(rng.standard_normal(tuple(tensor.shape)))
                for name, tensor in adapter.tensors()
            }
        )

    fresh = [
        fresh_adapter(base, modules, LoRA().peer(client, rank, modules), base.heads, seed)
        for client, rank in enumerate(RANKS)
    ]
    starts = [random(adapter, client) for client, adapter in enumerate(fresh)]
    return Tried(
        rule, base, starts, [random(adapter, client, 1) for client, adapter in enumerate(fresh)], seed
    )


def its_fields_are_a_frozen_dataclass(one: Tried) -> None:
    """The fields are all that a rule is, and nobody writes to them."""
    params = type(one.rule).__dict__.get("__dataclass_params__")
    if params is None or not params.frozen:
        raise Broken("expected @dataclass(frozen=True) above the class itself")


def it_survives_its_message(one: Tried) -> None:
    """A strategy's rule travels with its task, by the name of its class."""
    tensors, header = Task(one.starts[0], method=(one.rule,)).pack()
    back = Task.unpack(tensors, header)
    if (
        back.pack()[1] != header
        or _other(back.pack()[0], tensors)
        or type(back.method[0]) is not type(one.rule)
    ):
        raise Broken(f"a rule that was packed and unpacked is another one, {back.method[0]}")


def it_can_be_made_again(one: Tried) -> None:
    """A worker of Ray's gets it pickled, and a configuration with its class and fields makes it."""
    if (back := pickle.loads(pickle.dumps(one.rule))) != one.rule:
        raise Broken(f"a rule that was pickled is another one, {back}")
    kind = type(one.rule)
    values = {name: getattr(one.rule, name) for name in kind.__dict__.get("__dataclass_fields__", ())}
    if not all(isinstance(value, PLAIN) for value in values.values()):
        return  # only a strategy can bring it, in a message
    settings = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **values}
    config = Trust((kind.__module__,)).into(received(json.dumps({"rule": settings})))
    if (back := make(config, "rule", LocalRule)) != one.rule:
        raise Broken(f"a configuration with its fields makes another rule, {back}")


def nothing_that_is_given_changes(one: Tried) -> None:
    """Neither method writes to a tensor that it is given."""
    given = [*one.starts[0].tensors(), *one.moved[0].tensors()]
    before = [tensor.clone() for _, tensor in given]
    for method in (one.terms, one.ends):
        method(0)
        wrote = [
            name for (name, tensor), old in zip(given, before, strict=True) if not torch.equal(tensor, old)
        ]
        if wrote:
            which = "gradient" if method == one.terms else "finish"
            raise Broken(f"{which} writes to '{wrote[0]}', which it was given; make a new tensor")


def the_same_call_gives_the_same_answer(one: Tried) -> None:
    """An answer follows from the arguments and the fields, whoever was served before."""
    terms, ends = one.terms(0), [end.digest() for end in one.ends(0)]
    one.terms(1)
    one.ends(1)
    if name := _other(one.terms(0), terms):
        raise Broken(f"two equal calls of gradient differ at '{name}'; keep nothing, and draw no numbers")
    if [end.digest() for end in one.ends(0)] != ends:
        raise Broken("two equal calls of finish differ; keep nothing, and draw no numbers")


def its_terms_fit_what_is_trained(one: Tried) -> None:
    """A term for a tensor that the client trains is like it, also where a client trains a part only."""
    for client, adapter in enumerate(one.moved):
        start = dict(one.starts[client].tensors())
        for left in ("", ".A", ".B"):  # who trains both factors, or one of them
            now = {name: t for name, t in adapter.tensors() if not (left and name.endswith(left))}
            for name, term in one.rule.gradient(now, {name: start[name] for name in now}).items():
                if name not in now:
                    raise Broken(f"expected terms for what the client trains, got one for '{name}'")
                if _form(term) != _form(now[name]):
                    raise Broken(f"expected a term for '{name}' of {_form(now[name])}, got {_form(term)}")
                if not term.isfinite().all():
                    raise Broken(f"the term for '{name}' is not finite")


def it_ends_in_an_adapter_that_the_server_expects(one: Tried) -> None:
    """`finish` keeps every tensor's form, or gives one of those that `replies` announces."""
    for client, start in enumerate(one.starts):
        expected = [_forms(form) for form in (start, *one.rule.replies(start))]
        for end in one.ends(client):
            if (got := _forms(end)) not in expected:
                name = next(n for n in {**got, **expected[0]} if got.get(n) != expected[0].get(n))
                was, had = got.get(name, "nothing"), expected[0].get(name, "nothing")
                raise Broken(
                    f"finish gives '{name}' as {was}, expected {had}; announce other forms in `replies`"
                )
            if bad := [name for name, tensor in end.tensors() if not tensor.isfinite().all()]:
                raise Broken(f"finish gives '{bad[0]}' numbers that are not finite")


def clients_at_once_are_each_alone(one: Tried) -> None:
    """Of several clients in one pass each ends where it would end alone."""
    clients = range(len(RANKS))
    for client, together in zip(clients, one.train(_fresh(one.rule), *clients), strict=True):
        (alone,) = one.train(_fresh(one.rule), client)
        if _forms(alone) != _forms(together):
            raise Broken(f"client {client} ends in other ranks beside other clients than alone")
        own = dict(alone.tensors())
        for name, tensor in together.tensors():
            if (gap := float((tensor - own[name]).norm() / own[name].norm().clamp(min=1e-3))) > CLOSE:
                raise Broken(f"'{name}' of client {client} differs by {gap:.1e} beside other clients")


def its_answer_is_independent_of_rows(one: Tried) -> None:
    """Where the class says so, the same tensors get the same answer, whatever rows were trained on."""
    if not isinstance(one.rule.independent_of_rows, bool):
        raise Broken(
            f"expected independent_of_rows to be True or False, got {one.rule.independent_of_rows!r}"
        )
    if not one.rule.independent_of_rows:
        return
    try:
        check_private([one.rule])
    except ConfigError:
        raise Broken(
            "independent_of_rows is what a parent says of its own methods; say it in the class if it is true"
        ) from None
    terms, ends = [], []
    for text in (0, 1):
        one.train(one.rule, 0, text=text)
        terms.append(one.terms(0))
        ends.append([end.digest() for end in one.ends(0)])
    if name := _other(*terms):
        raise Broken(f"after training on other rows the same tensors get another term for '{name}'")
    if ends[0] != ends[1]:
        raise Broken("after training on other rows finish gives another adapter for the same tensors")


PROMISES: tuple[Callable[[Tried], None], ...] = (
    its_fields_are_a_frozen_dataclass,
    it_survives_its_message,
    it_can_be_made_again,
    nothing_that_is_given_changes,
    the_same_call_gives_the_same_answer,
    its_terms_fit_what_is_trained,
    it_ends_in_an_adapter_that_the_server_expects,
    clients_at_once_are_each_alone,
    its_answer_is_independent_of_rows,
)


def _fresh(rule: LocalRule) -> LocalRule:
    """The rule as another process makes it, of its fields alone."""
    return dataclasses.replace(rule) if dataclasses.is_dataclass(rule) else rule


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _forms(adapter: Adapter) -> dict[str, str]:
    """Name -> what a tensor is like; and module -> its scale."""
    scales = {name: f"scale {pair.scale}" for name, pair in adapter.pairs.items()}
    return {name: _form(tensor) for name, tensor in adapter.tensors()} | scales


def _other(one: Tensors, two: Tensors) -> str:
    """The first name under which two mappings differ by a bit; empty where they are equal."""
    for name in {**one, **two}:
        if name not in one or name not in two or not torch.equal(one[name], two[name]):
            return name
    return ""
