"""Refused pairings with callbacks; `compatibility` lists them all."""

from fedlora.callbacks.tracker import Tracker
from fedlora.privacy import ClientLevel

from .spec import RunSpec


def metrics_of_callbacks(spec: RunSpec) -> str | None:
    """Callbacks that decide by a metric, where no round has any."""
    names = [type(callback).__name__ for callback in spec.callbacks if callback.reads_metric]
    if names and not spec.evaluate.every and not spec.strategy.personal:
        return (
            f"evaluate.every: {' and '.join(names)} decide by what a round is evaluated on, and no round is; "
            "say evaluate.every=1"
        )
    return None


def selected_rounds(spec: RunSpec) -> str | None:
    """A round that is selected by test rows, or whose state is nobody's model."""
    names = [type(callback).__name__ for callback in spec.callbacks if callback.selects]
    if names and spec.strategy.personal:
        return (
            f"keep: {names[0]} makes the state of one round the result, and a client of "
            f"{spec.strategy_class} keeps a part of its model, which has gone on by then; say keep=last"
        )
    if names and spec.evaluate.rows != "validation":
        return (
            f"keep: {names[0]} selects a round by its metrics, and selected on the test rows the result "
            "would look better than it is; say evaluate.rows=validation, or keep=last"
        )
    return None


def tracked_clients(spec: RunSpec) -> str | None:
    """What a client's training measures, at a tracker."""
    tracked = any(isinstance(callback, Tracker) and callback.clients for callback in spec.callbacks)
    if tracked and isinstance(spec.privacy, ClientLevel):
        return (
            "track.clients: what a client's training measures is not covered by the epsilon of client-level "
            "privacy and must not go to a tracker; leave it out"
        )
    return None
