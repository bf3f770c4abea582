"""Which aggregation a run's settings ask for."""

from collections.abc import Sequence

from fedlora.core.update_step import UpdateStep
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.rounds.aggregation.base import Aggregation
from fedlora.rounds.aggregation.client_level import ClientLevelAggregation
from fedlora.rounds.aggregation.masked import MaskedAggregation
from fedlora.rounds.aggregation.plain import PlainAggregation
from fedlora.rounds.round_config import RoundConfig


def aggregation_for(
    config: RoundConfig, mechanism: ClientLevelMechanism | None = None, steps: Sequence[UpdateStep] = ()
) -> Aggregation:
    """The aggregation of a run.

    Args:
        config: says whether clients send under masks, and how they are weighted.
        mechanism: of client-level privacy; None without it.
        steps: whose server halves stand between the updates and the strategy; only plain aggregation has any.
    """
    uniform = config.weights == "uniform"
    if config.secure_sum:
        return MaskedAggregation(mechanism, uniform)
    if mechanism is not None:
        return ClientLevelAggregation(mechanism)
    return PlainAggregation(tuple(steps), uniform)
