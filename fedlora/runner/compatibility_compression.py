"""Refused pairings with compression; `compatibility` lists them all."""

from fedlora.compression import RandK
from fedlora.compression.words import for_uploads
from fedlora.core.strategy import named as strategies
from fedlora.robust import NormBound

from .dealt import Dealt
from .spec import RunSpec


def feedback_without_basis(spec: RunSpec) -> str | None:
    """What was lost of one round's factors is no change of the next round's, which are others."""
    if spec.compression is not None and spec.compression.error_feedback and not spec.strategy.fixed_basis:
        return (
            f"compression.error_feedback: strategy {spec.strategy_class} gives its factors other directions "
            "from round to round, and what a client has lost of the old ones is no change of the new ones; "
            f"leave it out, or use {strategies(lambda s: s.fixed_basis)}"
        )
    return None


def feedback_in_buffers(spec: RunSpec) -> str | None:
    """What was lost of a change, where a buffer gives the strategy other factors."""
    fixed = spec.strategy.staleness == "exact" and spec.strategy.server_space == "factors"
    if (
        spec.compression is not None
        and spec.compression.error_feedback
        and spec.scheduler.mixes_versions
        and not fixed
    ):
        return (
            f"compression.error_feedback: under {type(spec.scheduler).__name__} {spec.strategy_class} cuts "
            "what a buffer makes to its rank, which gives it other factors, and what a client has lost of "
            "the old ones is no change of the new ones; leave it out, or use ffalora or privatelora"
        )
    return None


def steps_in_code(spec: RunSpec) -> str | None:
    """A step's own code is no change of what was sent, which is what travels here."""
    named = [type(step).__name__ for step in spec.steps if step.at_client and step.at_server]
    if named and for_uploads(spec.compression) is not None:
        return (
            f"compression: {named[0]} makes a code of its own out of an update, and the change of a code "
            "means nothing; leave one of them out (steps with one half may stay)"
        )
    return None


def codes_under_robust_rule(spec: RunSpec) -> str | None:
    """A rule that compares updates number by number, of which each client sends others."""
    codec = for_uploads(spec.compression)
    if spec.robust is None or isinstance(spec.robust, NormBound):  # which looks at each by itself
        return None
    if codec is None or codec.codes_values or codec.exact or isinstance(codec, RandK):
        return None
    return (
        f"robust: {type(spec.robust).__name__} compares the same numbers of all clients, and under "
        f"{type(codec).__name__} each client sends others, so that most of what it compares is zero; use "
        "compression=randk, int8, nf4 or bf16"
    )


def masked_codes(spec: RunSpec) -> str | None:
    """What is summed under masks is a number at a place, both of them the same ones for all clients."""
    codec = for_uploads(spec.compression)
    if not spec.secure_sum or codec is None or (isinstance(codec, RandK) and codec.values == "none"):
        return None
    if isinstance(codec, RandK):
        return (
            f"compression.values={codec.values}: under secure_sum each number is masked as 8 bytes, whatever "
            "it was coded by; leave it out"
        )
    if not codec.codes_values:
        return (
            f"compression: under secure_sum the numbers of {type(codec).__name__} cannot be summed, since "
            "clients send other places, and places that follow from the rows would tell of them; use "
            "compression=randk"
        )
    return (
        f"compression: under secure_sum each number is masked as 8 bytes, so {type(codec).__name__} would "
        "save none; use compression=randk, whose places all clients of a round share"
    )


def masked_ranks(known: Dealt) -> str | None:
    """Under masks, a place is one of the largest form, which clients of smaller ranks have not all of."""
    if known.spec.secure_sum and for_uploads(known.spec.compression) is not None and len({*known.ranks}) > 1:
        return (
            "compression: under secure_sum clients share places among their numbers, so they need one rank, "
            f"got ranks {sorted({*known.ranks})}; use one, or leave out compression or secure_sum"
        )
    return None
