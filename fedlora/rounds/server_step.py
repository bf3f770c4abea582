"""What a run adds to the strategy's own step: the server half of a local rule, and a server optimizer.

Both remember things from round to round. What they remember is part of the state, under names of its own in
`State.memory`, and so it is in every checkpoint.
"""

from typing import Any

from fedlora.core.messages import Peer, State, Task
from fedlora.core.strategy import Strategy
from fedlora.rounds.aggregation.base import Aggregated
from fedlora.rounds.aggregation_error import sizes
from fedlora.rounds.rule_at_server import RuleAtServer
from fedlora.seeds import generator
from fedlora.server_optimizers import ServerOptimizer
from fedlora.server_optimizers.advance import advance, without_optimizer


class ServerStep:
    """Makes the tasks of a run, and the next state of what the strategy has made.

    Args:
        strategy: the algorithm.
        seed: the run's.
        rule: the server half of a local rule; None without one.
        optimizer: makes the server's step of what a round has changed; None moves by the change itself.
    """

    def __init__(
        self, strategy: Strategy, seed: int, rule: RuleAtServer | None, optimizer: ServerOptimizer | None
    ) -> None:
        self._strategy, self._seed, self._rule, self._optimizer = strategy, seed, rule, optimizer

    def shown(self, state: State) -> State:
        """The state as the strategy is shown it."""
        return without_optimizer(state)

    def task(self, state: State, peer: Peer) -> Task:
        """What a client is sent."""
        return (self._rule or self._strategy).task(self.shown(state), peer)

    def after(self, before: State, found: Aggregated, round: int) -> tuple[State, dict[str, Any]]:
        """The next state, and the numbers of the round's line.

        The checks and the error of the aggregation are those of the strategy's own state; the sizes are of
        what comes out.

        Args:
            before: the state from which the tasks were made.
            found: what the strategy has made of it.
            round: the round, from 1.

        Raises:
            IncompatibleUpdates: a step between has dropped what a client sent for the rule.
        """
        state, metrics = found.state, dict[str, Any](found.metrics)
        if self._rule is not None:
            state = self._rule.after(before, state, found.combined)
        if self._optimizer is None:
            return state, metrics
        rng = generator(self._seed, "aggregate", 0, round)
        answered, idle = found.answered, found.idle
        state, more = advance(self._strategy, self._optimizer, before, state, answered, rng, idle)
        return state, metrics | more | (sizes(state) if "delta_norm" in metrics else {})
