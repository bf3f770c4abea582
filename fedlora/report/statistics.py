"""What finished runs of several strategies, a seed each, say: means, intervals, paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from fedlora.errors import ConfigError
from fedlora.report.read import Run

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        strategies: names of the group `strategy`.
        baseline: the one that all others are compared with.
        rates: factors on each strategy's own learning rate that the search tries; with one there is none.
        seeds: of the runs; the search takes the first.
        rank: of all clients, for strategies that know no mixed ranks.
    """

    strategies: tuple[str, ...]
    baseline: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        for name in ("strategies", "rates", "seeds"):
            values = getattr(self, name)
            if isinstance(values, str) or not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"compare.{name}: expected a list of different values, such as [a,b], got {values}"
                )
        if self.baseline not in self.strategies:
            raise ConfigError(
                f"compare.baseline: expected one of {', '.join(self.strategies)}, got '{self.baseline}'"
            )


@dataclass(frozen=True)
class Score:
    """A mean over seeds, and half its 95 % interval by Student's t; None for one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Of these values."""
        mean, n = sum(values) / len(values), len(values)
        if n < 2:
            return cls(mean, None)
        error = float(stats.sem(values))
        return cls(mean, error * float(stats.t.ppf((1 + LEVEL) / 2, n - 1)))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True)
class Line:
    """What is found of one strategy.

    Args:
        strategy: its name.
        rate: the factor that the search chose.
        score: the metric at equal rounds.
        difference: from the baseline's, within seeds; None for the baseline.
        p: of a paired t-test that there is none; None for the baseline, or for one seed.
        thrifty: the metric at equal bytes.
        megabytes: that a run sends both ways, on the average.
        seconds: that a run takes, on the average.
        search: runs of the search, and the seconds of all of them.
    """

    strategy: str
    rate: float
    score: Score
    difference: Score | None
    p: float | None
    thrifty: Score
    megabytes: float
    seconds: float
    search: tuple[int, float]


def lines_of(
    what: Comparison, runs: Mapping[str, Sequence[Run]], chosen: Mapping[str, tuple[float, int, float]]
) -> list[Line]:
    """The comparison of finished runs, a seed each, in the order of the seeds."""
    budget = min(sent(run)[-1] for found in runs.values() for run in found)
    scores = {name: [last(run) for run in found] for name, found in runs.items()}
    lines = []
    for name, found in runs.items():
        apart, p = None, None
        if name != what.baseline:
            gaps = [a - b for a, b in zip(scores[name], scores[what.baseline], strict=True)]
            apart = Score.of(gaps)
            if len(gaps) > 1:
                p = float(stats.ttest_1samp(gaps, 0.0).pvalue) if len(set(gaps)) > 1 else float(gaps[0] == 0)
        rate, tried, seconds = chosen[name]
        lines.append(
            Line(
                name,
                rate,
                Score.of(scores[name]),
                apart,
                p,
                Score.of([at_bytes(run, budget) for run in found]),
                sum(sent(run)[-1] for run in found) / len(found) / 1e6,
                sum(run.summary["wall_seconds"] for run in found) / len(found),
                (tried, seconds),
            )
        )
    return lines


def sent(run: Run) -> list[int]:
    """Bytes that a run had sent both ways by the end of each round; round 0 first."""
    total = [0]
    for line in run.metrics:
        total.append(total[-1] + line["bytes_down"] + line["bytes_up"])
    return total


def at_bytes(run: Run, budget: float) -> float:
    """The headline metric when it was last measured before a run had sent more than this."""
    by = sent(run)
    return [value for round, value in run.series(run.metric) if by[round] <= budget][-1]


def last(run: Run) -> float:
    """The headline metric at the end."""
    return run.series(run.metric)[-1][1]


def worth(run: Run) -> float:
    """The same, larger where it is better."""
    return last(run) if run.more_is_better else -last(run)
