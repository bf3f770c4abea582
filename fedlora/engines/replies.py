"""What leaves a client: its update through the client halves of the steps, in the clear or under masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Context, Error, Message
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.update_step import ClientUpdate, UpdateStep
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.codec import FAILED, write_update
from fedlora.secure_aggregation.masked_round import SUM, write_masked
from fedlora.training.client import TrainRequest, TrainResult


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
    trained = {name: tensor.cpu() for name, tensor in outcome.adapter.tensors()}  # as what it was sent
    given = ClientUpdate(
        assignment.client,
        assignment.round,
        assignment.seed,
        assignment.task,
        assignment.start,
        outcome.adapter.with_tensors(trained),
        float(_examples(assignment, outcome)),
    )
    kept: dict[str, Tensor] = {}
    for at, step in enumerate(steps):
        own = {n.removeprefix(f"{at}/"): t for n, t in memory.items() if n.startswith(f"{at}/")}
        made = step.on_client(replace(given, memory=own))
        _check(step, given, made)
        kept |= {f"{at}/{name}": tensor for name, tensor in made.memory.items()}
        given = replace(given, adapter=made.adapter)
    return given.adapter, kept


def draft(message: Message, assignment: TrainRequest, outcome: TrainResult) -> Callable[[Context], Message]:
    """The reply to a training message, which the client's context completes.

    All that can fail in the clear fails here, before the round is paid for. Masks are used once, so they are
    put on by the function that is returned, and what then goes wrong is this client's alone.

    Args:
        message: what the client was sent.
        assignment: the same, read.
        outcome: with the adapter that is to be sent.
    """
    examples = _examples(assignment, outcome)
    if SUM not in message.content:
        reply = Message(write_update(outcome, assignment.task, assignment.round, examples), reply_to=message)
        return lambda context: reply

    def masked(context: Context) -> Message:
        try:
            content = write_masked(message, assignment.task, outcome, examples, context)
        except IncompatibleUpdates as error:
            return Message(Error(FAILED, str(error)), reply_to=message)
        return Message(content, reply_to=message)

    return masked


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
