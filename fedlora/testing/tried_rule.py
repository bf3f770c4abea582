"""A local rule in the hands of a few clients, for the checks of its promises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, Task, Update
from fedlora.data import Example
from fedlora.models import Base, LoRA, fresh_adapter, load, targets
from fedlora.models.packaged import tiny
from fedlora.tasks import Classification
from fedlora.training.client import TrainRequest
from fedlora.training.rules.base import LocalRule, RoundEnd, RoundStart, ServerMemory

RANKS = (2, 2, 5)  # of the clients
CLIENT = LocalTraining(lr=0.05, batch_size=4, steps=3, optimizer=partial(torch.optim.SGD))
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
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
        work = []
        for client in clients:
            moment = self.moments(client, rule)[-1]
            memory = {f"0/{name}": tensor for name, tensor in moment.memory.items()}
            task = Task(self.starts[client], method=(moment.rule,))
            work.append(TrainRequest(client, 2, self.seed, task, self.rows(client, text), memory))
        return [result.adapter for result in CLIENT.train(self.base, work)]

    def rows(self, client: int, text: int) -> list[Example]:
        """A client's rows, others for every `text`."""
        rng = np.random.default_rng([self.seed, client, text])
        return [Example(rng.integers(2, 200, 3 + (i + text) % 5).tolist(), i % 3) for i in range(8 + client)]

    def moments(self, client: int, rule: LocalRule | None = None) -> list["Moment"]:
        """A client's first round with the rule, and the next one if it remembers anything."""
        rule = self.rule if rule is None else rule
        first = ServerMemory(0, {}, [(_shapes(start), 1) for start in self.starts])
        begun = Moment(self._half(rule, first, client), {}, first)
        if not _remembers(rule):
            return [begun]
        left = [self._half(rule, first, k).end(self.ended(k, {})) for k in range(len(RANKS))]
        updates = [self.update(k, left[k].sent, 0) for k in range(len(RANKS))]
        later = replace(first, version=1, tensors=rule.learn(first, updates))
        return [begun, Moment(self._half(rule, later, client), left[client].memory, later)]

    def ended(self, client: int, memory: Tensors) -> RoundEnd:
        """Where a client's steps have led: to the adapter that has moved."""
        start = self.starts[client]
        rates = dict.fromkeys(dict(start.tensors()), 0.05)
        return RoundEnd(start, self.moved[client], 3, rates, memory)

    def update(self, client: int, sent: Tensors, version: int) -> Update:
        """A client's update, with what the rule sends."""
        return Update(self.moved[client], 1.0, Peer(client, RANKS[client]), version=version, sent=sent)

    def terms(self, client: int, left: str = "") -> dict[str, Tensor]:
        """What the rule adds where a client has moved.

        Args:
            client: whose tensors.
            left: the end of the names of what the client does not train; empty where it trains all.
        """
        moment, start = self.moments(client)[-1], self.starts[client]
        now = {name: t for name, t in self.moved[client].tensors() if not (left and name.endswith(left))}
        begun = {name: tensor for name, tensor in start.tensors() if name in now}
        return dict(moment.rule.term(RoundStart(start, begun, moment.memory))(now))

    def left(self, client: int) -> dict[str, Tensor]:
        """What the rule keeps and sends after the client's round."""
        moment = self.moments(client)[-1]
        found = moment.rule.end(self.ended(client, moment.memory))
        return {**{f"memory {name}": tensor for name, tensor in found.memory.items()}, **found.sent}

    def ends(self, client: int) -> list[Adapter]:
        """The rule's last word on an adapter that has moved, and on one that has got smaller."""
        start, rule = self.starts[client], self.moments(client)[-1].rule
        smaller = start.with_tensors({name: 0.5 * tensor for name, tensor in start.tensors()})
        return [rule.finish(trained, start) for trained in (self.moved[client], smaller)]

    def _half(self, rule: LocalRule, known: ServerMemory, client: int) -> LocalRule:
        """The rule as a client has it."""
        return rule.ask(known, Task(self.starts[client]), Peer(client, RANKS[client]))


@dataclass(frozen=True)
class Moment:
    """A rule before a client's round.

    Args:
        rule: its half at the client.
        memory: what the client has kept.
        known: what the server remembers.
    """

    rule: LocalRule
    memory: Tensors
    known: ServerMemory


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


def _remembers(rule: LocalRule) -> bool:
    """Whether a round may depend on the one before it."""
    return rule.at_server or type(rule).end is not LocalRule.end


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.tensors()}
