"""What leaves a client: its update through the client halves of the steps, in the clear or under masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import Context, Error, Message
from torch import Tensor

from fedlora.compression import Compression, MessageKey
from fedlora.compression.update import code_update
from fedlora.core.adapter import Adapter
from fedlora.core.update_step import ClientUpdate, UpdateStep
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds import compressed
from fedlora.rounds.codec import FAILED, write_update
from fedlora.secure_aggregation.masked_round import SUM, write_masked
from fedlora.training.client import TrainRequest, TrainResult

LOST = "code/"  # begins the names of what error feedback keeps, among what the steps keep


@dataclass(frozen=True)
class Outgoing:
    """What one client sends and keeps.

    Args:
        outcome: what training gave, with the adapter that the receiver will read.
        kept: what steps and error feedback keep for the next time. It is one file, since they go on together.
        arrays: of the code of the change; None where the update travels as it is.
    """

    outcome: TrainResult
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    arrays: Mapping[str, Any] | None = None


def client_halves(
    steps: Sequence[UpdateStep], assignment: TrainRequest, outcome: TrainResult, memory: Mapping[str, Tensor]
) -> tuple[Adapter, dict[str, Tensor]]:
    """What the client halves of the steps make of what training gave, and what they keep for the next time.

    Args:
        steps: in the order in which they are applied.
        assignment: what the client was asked.
        outcome: what training gave.
        memory: what the steps kept the last time, each name behind its step's place in the list: "0/error".

    Raises:
        IncompatibleUpdates: a step returned no update, or one of other tensors than it was given.
    """
    given = _given(assignment, outcome)
    kept: dict[str, Tensor] = {}
    for at, step in enumerate(steps):
        own = {n.removeprefix(f"{at}/"): t for n, t in memory.items() if n.startswith(f"{at}/")}
        made = step.on_client(replace(given, memory=own))
        _check(step, given, made)
        kept |= {f"{at}/{name}": tensor for name, tensor in made.memory.items()}
        given = replace(given, adapter=made.adapter)
    return given.adapter, kept


def outgoing(
    steps: Sequence[UpdateStep],
    codec: Compression | None,
    assignment: TrainRequest,
    outcome: TrainResult,
    memory: Mapping[str, Tensor],
) -> Outgoing:
    """An outcome after the client halves of the steps, and in code.

    Args:
        steps: in the order in which they are applied.
        codec: of the run's updates; None where they travel as they are.
        assignment: what the client was asked; its task is as the client has received it.
        outcome: what training gave.
        memory: what was kept the last time.

    Raises:
        IncompatibleUpdates: as `client_halves`.
    """
    adapter, kept = client_halves(steps, assignment, outcome, memory)
    outcome = replace(outcome, adapter=adapter)
    if codec is None:
        return Outgoing(outcome, kept)
    given = _given(assignment, outcome)
    lost = {name.removeprefix(LOST): tensor for name, tensor in memory.items() if name.startswith(LOST)}
    key = MessageKey(assignment.seed, assignment.client, assignment.round)
    coded = code_update(codec, given.change, lost, key)
    kept |= {f"{LOST}{name}": tensor for name, tensor in coded.memory.items()}
    return Outgoing(replace(outcome, adapter=given.moved(coded.change).adapter), kept, coded.arrays)


def draft(message: Message, assignment: TrainRequest, sent: Outgoing) -> Callable[[Context], Message]:
    """The reply to a training message, which the client's context completes.

    All that can fail in the clear fails here, before the round is paid for. Masks are used once, so they are
    put on by the function that is returned, and what then goes wrong is this client's alone.

    Args:
        message: what the client was sent.
        assignment: the same, read.
        sent: what is to be sent.
    """
    outcome = sent.outcome
    examples = _examples(assignment, outcome)
    if SUM not in message.content:
        content = write_update(outcome, assignment.task, assignment.round, examples)
        if sent.arrays is not None:
            compressed.code_update(content, assignment.task, outcome.adapter, sent.arrays)
        reply = Message(content, reply_to=message)
        return lambda context: reply

    def masked(context: Context) -> Message:
        try:
            content = write_masked(message, assignment.task, outcome, examples, context)
        except IncompatibleUpdates as error:
            return Message(Error(FAILED, str(error)), reply_to=message)
        return Message(content, reply_to=message)

    return masked


def _given(assignment: TrainRequest, outcome: TrainResult) -> ClientUpdate:
    """A client's update on its way, on the processor, as what it was sent."""
    trained = {name: tensor.cpu() for name, tensor in outcome.adapter.tensors()}
    return ClientUpdate(
        assignment.client,
        assignment.round,
        assignment.seed,
        assignment.task,
        assignment.start,
        outcome.adapter.with_tensors(trained),
        float(_examples(assignment, outcome)),
    )


def _examples(assignment: TrainRequest, outcome: TrainResult) -> int:
    return len(assignment.rows) if outcome.examples is None else outcome.examples


def _check(step: UpdateStep, given: ClientUpdate, made: Any) -> None:
    """Refuse what a client half returns if it is not the update that it was given with other numbers."""
    name = f"steps: {type(step).__name__}.on_client"
    if not isinstance(made, ClientUpdate):
        raise IncompatibleUpdates(
            f"{name}: expected what given.become(...) or given.moved(...) returns, got {type(made).__name__}"
        )
    before, after = _form(given.adapter), _form(made.adapter)
    if before != after:
        odd = next(key for key in sorted({*before, *after}) if before.get(key) != after.get(key))
        raise IncompatibleUpdates(
            f"{name}: expected '{odd}' as it was given, {before.get(odd)}, got {after.get(odd)}; a step may "
            "change numbers, and neither shapes, precisions nor scales"
        )


def _form(adapter: Adapter) -> dict[str, Any]:
    """The shapes and precisions of an adapter's tensors, and its scales, by their names."""
    tensors = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in adapter.tensors()}
    return {**tensors, **{f"{module}.scale": pair.scale for module, pair in adapter.pairs.items()}}


def version_of(message: Message) -> int | None:
    """The state that a task comes from; None where the server counts on nothing from before."""
    version = int(message.content.config_records["config"].get("version", -1))  # type: ignore[arg-type]
    return None if version < 0 else version
