"""Warnings at the top of the report: rank collapse, measured by the share of ΔW's tail that a round keeps."""

import statistics
from collections.abc import Sequence

from fedlora.report.compare import labels
from fedlora.report.read import Run
from fedlora.report.seeds import groups

KEPT = 0.9  # least share of the tail in the median round; after ten rounds at 0.9 a third of it is left

MEANING = (
    f"Rank collapse is reported where ranks are mixed and the median round keeps less than {KEPT:.0%} of "
    "the tail. The tail is ΔW in the directions beyond the smallest rank of the round’s clients; a round "
    "keeps the share ⟨new ΔW, old tail⟩ / ‖old tail‖² of it. Clients that cannot hold a direction count as "
    "zeros in its mean, so that it shrinks in every round."
)


def collapses(runs: Sequence[Run]) -> list[str]:
    """One sentence for each setting with rank collapse; runs that differ in seed alone are one setting."""
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
