"""The line of a round in metrics.jsonl, from the lines of its clients."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def totals(
    round: int,
    lines: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    seconds: float,
    losses: bool = True,
    named: Callable[[float, float], dict[str, float]] | None = None,
    score: str = "accuracy",
) -> dict[str, Any]:
    """The line of a round in metrics.jsonl.

    Args:
        round: its number, from 1.
        lines: the round's lines of clients.jsonl.
        metrics: what is known of the new state.
        seconds: how long it took.
        losses: whether the clients' training losses may be shown.
        named: turns loss and score into the metrics of the learning task, where the clients' own models are
            the result.
        score: what clients call the score of their own models, after "local_" (`LearningTask.score`).
    """
    metrics = dict(metrics)
    good = [line for line in lines if line["status"] == "ok"]
    with_loss = [line for line in good if "loss" in line] if losses else []
    examples = sum(line["examples"] for line in with_loss)
    local = f"local_{score}"
    own = [line for line in good if line.keys() >= {local, "local_loss"}]
    if own:
        metrics[local] = statistics.fmean(line[local] for line in own)
        metrics["local_loss"] = statistics.fmean(line["local_loss"] for line in own)
        if named:
            metrics |= named(metrics["local_loss"], metrics[local])
    if clipped := [line["clipped"] for line in good if "clipped" in line]:
        metrics["clipped"] = statistics.fmean(clipped)
    return {
        "round": round,
        **metrics,
        # By shares: a sum of absurd losses that clients report would be infinite, and that is no JSON.
        "train_loss": sum(line["loss"] * (line["examples"] / examples) for line in with_loss)
        if with_loss
        else None,
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "seconds": seconds,
        "clients": len(good),
        "dropped": len([line for line in lines if line["status"] == "dropped"]),
        "epsilon": None,
    }
