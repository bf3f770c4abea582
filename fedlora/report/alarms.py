"""What a reader must not overlook: rank collapse, by the share of ΔW's tail that a round keeps."""

import statistics
from collections.abc import Sequence

from fedlora.report.compare import labels
from fedlora.report.read import Run
from fedlora.report.seeds import groups

KEPT = 0.9  # of the tail, in the median round: ten such rounds leave a third of what is not learned anew

MEANING = (
    f"Rank collapse is called where ranks are mixed and the median round keeps less than {KEPT:.0%} of the "
    "tail: of ΔW’s directions beyond the smallest rank of the round’s clients, by ⟨new ΔW, old tail⟩ / "
    "‖old tail‖². Clients that cannot hold a direction then count as zeros in its mean, round after round."
)


def collapses(runs: Sequence[Run]) -> list[str]:
    """One sentence for each setting whose update loses its tail."""
    together = groups(runs)
    found = []
    for name, group in zip(labels([group[0] for group in together]), together, strict=True):
        kept = [value for run in group for _, value in run.series("tail_kept")]
        if kept and (middle := statistics.median(kept)) < KEPT:
            smallest = min(group[0].summary.get("ranks") or [0])
            found.append(
                f"Rank collapse in {name}: a round keeps {max(middle, 0):.0%} of what the update holds "
                f"beyond rank {smallest}, the smallest of its clients."
            )
    return found
