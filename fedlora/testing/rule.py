"""The promises of a local rule, each a check of its own, and one call that tries them all.

    from fedlora.testing import check_rule

    check_rule(MyRule(rate=0.1))

The checks train clients of two ranks on the tiny random encoder (`model=tiny`), in float64. A rule that
remembers, or has a half at the server, is tried in its first round and in the one after that.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fedlora.config.instantiate import Trust, make, received
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, State, Task
from fedlora.errors import ConfigError
from fedlora.testing.promises import Broken, broken_of, report
from fedlora.testing.tried_rule import RANKS, Tried, tried
from fedlora.training.rules.base import LocalRule, RoundStart, check_private

CLOSE = 1e-7  # relative; the model computes in float64
PLAIN = (bool, int, float, str, type(None))  # values that a command line can name
Tensors = Mapping[str, Tensor]


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


def its_fields_are_a_frozen_dataclass(one: Tried) -> None:
    """The fields are all that a rule is, and nobody writes to them."""
    params = type(one.rule).__dict__.get("__dataclass_params__")
    if params is None or not params.frozen:
        raise Broken("expected @dataclass(frozen=True) above the class itself")


def it_survives_its_message(one: Tried) -> None:
    """A rule that a strategy brings or a server sends travels with a task, by the name of its class."""
    for rule in (one.rule, *(moment.rule for moment in one.moments(2))):
        tensors, header = Task(one.starts[0], method=(rule,)).pack()
        back = Task.unpack(tensors, header)
        same = back.pack()[1] == header and not _other(back.pack()[0], tensors)
        if not same or type(back.method[0]) is not type(rule):
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
    """No method writes to a tensor that it is given."""
    moment, start, moved = one.moments(0)[-1], one.starts[0], one.moved[0]
    left, begun = moment.rule.end(one.ended(0, moment.memory)), dict(start.tensors())
    given = [*start.tensors(), *moved.tensors(), *moment.memory.items(), *moment.known.tensors.items()]
    given += left.sent.items()
    before = [tensor.clone() for _, tensor in given]
    calls: dict[str, Callable[[], object]] = {
        "gradient": lambda: moment.rule.term(RoundStart(start, begun, moment.memory))(dict(moved.tensors())),
        "finish": lambda: one.ends(0),
        "end": lambda: moment.rule.end(one.ended(0, moment.memory)),
        "learn": lambda: one.rule.learn(moment.known, [one.update(0, left.sent, 1)]),
        "ask": lambda: one.rule.ask(moment.known, Task(start), Peer(0, RANKS[0])),
    }
    for name, call in calls.items():
        call()
        wrote = [n for (n, tensor), old in zip(given, before, strict=True) if not torch.equal(tensor, old)]
        if wrote:
            raise Broken(f"{name} writes to '{wrote[0]}', which it was given; make a new tensor")


def the_same_call_gives_the_same_answer(one: Tried) -> None:
    """An answer follows from the arguments and the fields, whoever was served before."""
    terms, ends, left = one.terms(0), [end.digest() for end in one.ends(0)], one.left(0)
    for client in (1, 0):
        again = one.terms(client), [end.digest() for end in one.ends(client)], one.left(client)
    if name := _other(again[0], terms):
        raise Broken(f"two equal calls of gradient differ at '{name}'; keep nothing, and draw no numbers")
    if again[1] != ends:
        raise Broken("two equal calls of finish differ; keep nothing, and draw no numbers")
    if name := _other(again[2], left):
        raise Broken(f"two equal calls of end differ at '{name}'; keep nothing, and draw no numbers")


def its_terms_fit_what_is_trained(one: Tried) -> None:
    """A term for a tensor that the client trains is like it, also where a client trains a part only."""
    for client, adapter in enumerate(one.moved):
        for left in ("", ".A", ".B"):  # who trains both factors, or one of them
            now = {name: t for name, t in adapter.tensors() if not (left and name.endswith(left))}
            for name, term in one.terms(client, left).items():
                if name not in now:
                    raise Broken(f"expected terms for what the client trains, got one for '{name}'")
                if _form(term) != _form(now[name]):
                    raise Broken(f"expected a term for '{name}' of {_form(now[name])}, got {_form(term)}")
                if not term.isfinite().all():
                    raise Broken(f"the term for '{name}' is not finite")


def it_sends_what_it_announces(one: Tried) -> None:
    """A client's reply has every tensor that `sends` names, like the one there, and no other."""
    for client, start in enumerate(one.starts):
        for moment in one.moments(client):
            announced = {n: _form(t) for n, t in moment.rule.sends(Task(start)).items()}
            sent = moment.rule.end(one.ended(client, moment.memory)).sent
            for name in sorted({**announced, **sent}):
                want = announced.get(name, "nothing")
                if (got := _form(sent[name]) if name in sent else "nothing") != want:
                    raise Broken(f"end sends '{name}' as {got}, and sends announces {want}")
                if not sent[name].isfinite().all():
                    raise Broken(f"end sends '{name}' with numbers that are not finite")
            if sent and not one.rule.at_server:
                raise Broken("end sends tensors, and there is no ask by which a server would expect them")


def what_it_remembers_can_be_written_down(one: Tried) -> None:
    """A client's memory and the server's are finite tensors on the CPU, and come back from a file."""
    for client in range(len(RANKS)):
        moment = one.moments(client)[-1]
        for who, kept in {"end": moment.memory, "learn": moment.known.tensors}.items():
            for name, tensor in kept.items():
                if not (
                    isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.isfinite().all()
                ):
                    raise Broken(f"{who} keeps '{name}', which is no finite tensor on the CPU")
        state = State(one.starts[client], memory=moment.known.tensors)
        if _other(State.unpack(*state.pack()).memory, moment.known.tensors):
            raise Broken("what learn keeps does not come back from a checkpoint")


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
        terms.append({**one.terms(0), **one.left(0)})
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
    it_sends_what_it_announces,
    what_it_remembers_can_be_written_down,
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
