"""How good each round of a run is, by one metric of its line."""

import math
from collections.abc import Iterator

from fedlora.callbacks.base import RunHandle
from fedlora.errors import ConfigError

SMALLER_IS_BETTER = ("loss", "perplexity", "error", "mae", "mse")  # ends of the names of such metrics


def scores(run: RunHandle, metric: str | None = None) -> Iterator[tuple[int, float]]:
    """Every evaluated round with its score, of which more is better; the worst one where it is no number.

    Args:
        run: the run, whose finished rounds are looked at.
        metric: a key of metrics.jsonl; None takes the headline metric. Of other metrics than that, smaller
            values are better where the name ends in a word of SMALLER_IS_BETTER.

    Raises:
        ConfigError: a round that was evaluated has no such metric; says which it has.
    """
    name = metric or run.metric
    more = run.more_is_better if name == run.metric else not name.endswith(SMALLER_IS_BETTER)
    for line in run.metrics:
        if name in line:
            value = line[name]
            good = isinstance(value, int | float) and not math.isnan(value)
            yield int(line["round"]), float(value if more else -value) if good else -math.inf
        elif "loss" in line:
            known = sorted(key for key, value in line.items() if isinstance(value, float))
            raise ConfigError(f"metric: expected one of {', '.join(known)}, got '{name}'")
