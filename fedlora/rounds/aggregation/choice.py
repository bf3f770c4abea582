"""Which aggregation a run's settings ask for."""

from collections.abc import Sequence

from fedlora.core.update_step import UpdateStep
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation.base import Aggregation
from fedlora.rounds.aggregation.client_level import ClientLevelAggregation
from fedlora.rounds.aggregation.masked import MaskedAggregation
from fedlora.rounds.aggregation.plain import PlainAggregation
from fedlora.rounds.aggregation.tree import TreeAggregation
from fedlora.rounds.round_config import RoundConfig
from fedlora.rounds.tree import Tree


def aggregation_for(
    config: RoundConfig, mechanism: ClientLevelMechanism | None = None, steps: Sequence[UpdateStep] = ()
) -> Aggregation:
    """The aggregation of a run.

    Args:
        config: says whether clients send under masks, and how they are weighted.
        mechanism: of client-level privacy; None without it.
        steps: whose server halves stand between the updates and the strategy; only where clients send in the
            clear are there any.
    """
    uniform = config.weights == "uniform"
    tree = Tree(config.tree, config.clients)
    if config.secure_sum:
        return MaskedAggregation(mechanism, uniform, tree if tree.levels > 0 else None)
    if mechanism is not None:
        return ClientLevelAggregation(mechanism)
    if tree.levels > 0:
        return TreeAggregation(tree, config, tuple(steps))
    return PlainAggregation(tuple(steps), uniform)
