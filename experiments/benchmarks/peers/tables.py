"""The table and the goals, from the runs of every system."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .measured import Run

US = "fedlora fused"  # of whom the goals speak


@dataclass(frozen=True)
class Found:
    """What is said of a system: medians over its repeats.

    Args:
        first: seconds to the end of round 1.
        steady: seconds of a later round.
        whole: seconds of all.
        peak: MB of memory.
        apart: relative difference of the final adapter from the bare loop's.
        accuracy: of the final adapter on the test rows.
        client: MB of memory for one more client, if measured.
    """

    first: float
    steady: float
    whole: float
    peak: float
    apart: float
    accuracy: float
    client: float | None = None

    @classmethod
    def of(cls, runs: Sequence[Run], apart: float, accuracy: float, client: float | None) -> "Found":
        """The medians."""
        median = statistics.median
        return cls(
            median(run.ends[0] for run in runs),
            median(median(run.rounds) for run in runs),
            median(run.whole for run in runs),
            median(run.peak_mb for run in runs),
            apart,
            accuracy,
            client,
        )


def slope(runs: Mapping[int, Sequence[Run]]) -> float | None:
    """MB a client, from the medians of the peaks of runs by their number of clients; None without runs."""
    if not runs:
        return None
    few, many = min(runs), max(runs)
    low, high = (statistics.median(run.peak_mb for run in runs[clients]) for clients in (few, many))
    return (high - low) / (many - few)


def fastest(found: Mapping[str, Found], what: str) -> tuple[str, float]:
    """The peer that takes least, and what it takes; nobody, and nan, without peers."""
    peers = {name: float(getattr(one, what)) for name, one in found.items() if not name.startswith("fedlora")}
    return min(peers.items(), key=lambda item: item[1], default=("nobody", float("nan")))


def table(found: Mapping[str, Found], floor: float, rate: float, peak: float) -> list[str]:
    """A line a system, and the floor's; beside seconds the ratio to the fastest peer."""
    heads = ["system", "to end of round 1", "a later round", "whole job", "peak memory", "MB a client"]
    heads += ["differs from the bare loop", "accuracy"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, one in found.items():
        cells = [_ratio(getattr(one, what), fastest(found, what)[1]) for what in ("first", "steady", "whole")]
        cells += [f"{one.peak:.0f} MB", "" if one.client is None else f"{one.client:.2f}"]
        cells += [f"{one.apart:.0e}", f"{one.accuracy:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    said = f"floor: {floor:.3g} GFLOP at {rate:.0f} GFLOP/s"
    cells = [
        "",
        _ratio(floor / rate, fastest(found, "steady")[1]),
        "",
        f"{peak:.0f} GFLOP/s large",
        "",
        "",
        "",
    ]
    return [*lines, f"| {said} | {' | '.join(cells)} |"]


def goals(found: Mapping[str, Found], needed: float) -> list[str]:
    """Each goal and where we are; `needed` is the MB of a client's adapter and optimizer state."""
    if US not in found:
        return []
    us, lines = found[US], []
    for what, name in (("steady", "steady round"), ("whole", "whole job")):
        peer, least = fastest(found, what)
        lines.append(f"{name} at most 0.5 of the fastest peer's ({peer}): {getattr(us, what) / least:.2f}")
    if "flower-cached" in found:
        ratio = us.first / found["flower-cached"].first
        lines.insert(1, f"first round at most 0.33 of Flower's simulation (cached): {ratio:.2f}")
    if us.client is not None:
        own = f"its adapter and optimizer state ({needed:.2f} MB)"
        lines.append(f"memory per added client at most {own}: {us.client:.2f} MB")
    return lines


def _ratio(value: float, least: float) -> str:
    return f"{value:.2f} s ({value / least:.2f})"
