"""Refused pairings with update steps; `compatibility` lists them all."""

from fedlora.privacy import ClientLevel

from .dealt import Dealt
from .spec import RunSpec


def steps_without_updates(spec: RunSpec) -> str | None:
    """Server halves over single updates, where the server combines none.

    A client half alone may do anything: what it returns is an adapter like any other, which is clipped,
    weighted and summed as what training gave would be.
    """
    named = [type(step).__name__ for step in spec.steps if step.at_server]
    if named and (spec.secure_sum or isinstance(spec.privacy, ClientLevel)):
        what = "secure_sum" if spec.secure_sum else "privacy=client_level"
        return (
            f"steps: under {what} the strategy is shown a sum, and at the server there is no single update "
            f"for {named[0]} to work on; leave it out (steps with an on_client alone may stay)"
        )
    return None


def updates_in_code(spec: RunSpec) -> str | None:
    """What travels between the two halves of a step need not be a model that could be evaluated."""
    named = [type(step).__name__ for step in spec.steps if step.at_client and step.at_server]
    if spec.evaluate.updates and named:
        return (
            f"evaluate.updates: what a client sends is {named[0]}'s code for its update until the server has "
            "undone it, and no model; leave one of them out"
        )
    return None


def least_for_steps(known: Dealt) -> str | None:
    """A step that needs more updates than a round has clients."""
    most = known.spec.round_config(known.clients).enough(known.clients)
    for step in known.spec.steps:
        if step.least > most:
            return (
                f"steps: {type(step).__name__} needs at least {step.least} clients a round, got {most}; "
                "raise clients and clients_per_round"
            )
    return None
