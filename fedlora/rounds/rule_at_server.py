"""The half of a run's local rule at the server: what goes out with each task, and what is remembered.

What a rule remembers is part of the state, in `State.memory` under names of its own, so that it is in every
checkpoint. The strategy neither reads nor writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.registry import ClientRegistry
from fedlora.training.rules.base import LocalRule, ServerMemory, part_of

Kind = tuple[Mapping[str, tuple[int, ...]], int]
RULE = "rule/"  # begins the names of what a rule remembers, in `State.memory`


class RuleAtServer:
    """Puts a rule into the tasks of a run, and its memory into the states.

    Args:
        rule: has a half at the server.
        strategy: makes the tasks.
        registry: the clients.
        clients: how many there are.
    """

    def __init__(self, rule: LocalRule, strategy: Strategy, registry: ClientRegistry, clients: int) -> None:
        self._rule, self._strategy, self._registry, self._clients = rule, strategy, registry, clients
        self._counted: tuple[object, Sequence[Kind]] = (None, ())

    def task(self, state: State, peer: Peer) -> Task:
        """The strategy's task for a client, with the rule behind the strategy's own parts."""
        task = self._strategy.task(state, peer)
        return replace(task, method=(*task.method, self._rule.ask(self._known(state), task, peer)))

    def after(self, before: State, state: State, updates: Sequence[Update]) -> State:
        """The next state, with what the rule remembers from now on.

        Args:
            before: the state from which the tasks were made.
            state: what the strategy has made of it.
            updates: those that the strategy was given.

        Raises:
            IncompatibleUpdates: a step between has dropped what a client sent for the rule.
        """
        task = self.task(before, self._registry.widest)
        at = len(task.method) - 1
        wanted = part_of(task.sent(), at).keys()
        own = [replace(update, sent=part_of(update.sent, at)) for update in updates]
        if any(update.sent.keys() != wanted for update in own):
            raise IncompatibleUpdates(
                f"rule {type(self._rule).__name__}: some updates have lost what their clients sent for it; a "
                "step has to make updates by dataclasses.replace(update, ...)"
            )
        learned = self._rule.learn(self._known(before), own)
        rest = {name: tensor for name, tensor in state.memory.items() if not name.startswith(RULE)}
        return replace(state, memory={**rest, **{f"{RULE}{name}": t for name, t in learned.items()}})

    def _known(self, state: State) -> ServerMemory:
        known = {n.removeprefix(RULE): t for n, t in state.memory.items() if n.startswith(RULE)}
        peers = self._registry.kinds(self._clients)
        counted = (state.round, peers)
        if self._counted[0] != counted:  # once a round, and not for each of its messages
            self._counted = (counted, [(self._shapes(state, peer), clients) for peer, clients in peers])
        return ServerMemory(state.round, known, self._counted[1])

    def _shapes(self, state: State, peer: Peer) -> dict[str, tuple[int, ...]]:
        task = self._strategy.task(state, peer)
        tensors = dict(task.adapter.tensors())
        return {name: tuple(tensors[name].shape) for name in task.shared()}
