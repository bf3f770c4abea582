"""Which aggregation a run's settings ask for."""

from collections.abc import Sequence

from fedlora.compression import Compression, RandK
from fedlora.compression.words import for_uploads
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
    config: RoundConfig,
    mechanism: ClientLevelMechanism | None = None,
    steps: Sequence[UpdateStep] = (),
    compression: Compression | None = None,
) -> Aggregation:
    """The aggregation of a run.

    Args:
        config: says whether clients send under masks, and how they are weighted.
        mechanism: of client-level privacy; None without it.
        steps: whose server halves stand between the updates and the strategy; only where clients send in the
            clear are there any.
        compression: how the numbers of messages travel; None as they are.
    """
    uniform, codec = config.weights == "uniform", for_uploads(compression)
    sparse = codec is not None and not codec.codes_values
    tree = Tree(config.tree, config.clients)
    if config.secure_sum:
        assert codec is None or isinstance(codec, RandK), "runner.compatibility refuses others under masks"
        return MaskedAggregation(mechanism, uniform, codec, config.seed, tree if tree.levels > 0 else None)
    if mechanism is not None:
        return ClientLevelAggregation(mechanism)
    if tree.levels > 0:
        return TreeAggregation(tree, config, tuple(steps), sparse)
    return PlainAggregation(tuple(steps), uniform, sparse)
