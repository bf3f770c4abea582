"""A client's update in code: its change with what earlier messages have lost, and what this one loses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.core.vectors import Form, flat, split

from .base import Compression, MessageKey, Numbers


@dataclass(frozen=True)
class CodedUpdate:
    """What a client sends, and keeps.

    Args:
        arrays: as they travel.
        change: what the receiver will read from them, name -> float32 tensor.
        memory: what error feedback keeps for the client's next message; empty without it.
    """

    arrays: Mapping[str, Any]
    change: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]


def code_update(
    codec: Compression, change: Mapping[str, Tensor], memory: Mapping[str, Tensor], key: MessageKey
) -> CodedUpdate:
    """A change in code, and what is kept for the next one.

    With error feedback, where e is what was kept and δ the change,

        e ← e + δ,    send C(e),    e ← e - C(e)

    (Karimireddy, Rebjock, Stich, Jaggi. "Error Feedback Fixes SignSGD and other Gradient Compression
    Schemes". ICML 2019. https://arxiv.org/abs/1901.09847). So what was sent and what is kept are together
    all changes, however seldom the client takes part. What is kept does not lose weight with its age: codes
    that leave most numbers out would then never send the most of a change.

    Args:
        codec: makes the code.
        change: name -> change of each shared tensor, in the order of the message.
        memory: what the client kept the last time; empty if it kept nothing.
        key: of the message.
    """
    form = {name: tuple(tensor.shape) for name, tensor in change.items()}
    whole = vector(change)
    if codec.error_feedback:
        whole = whole + vector(_held(memory, form))
    arrays = codec.encode(whole, lengths(form), key)
    sent = codec.decode(arrays, lengths(form), key)
    kept = memory if codec.error_feedback else {}
    with np.errstate(invalid="ignore"):
        lost = whole - sent
    if codec.error_feedback and np.isfinite(lost).all():  # else training has diverged: the old stays
        kept = {**memory, **tensors(lost, form)}
    return CodedUpdate(arrays, tensors(sent, form), kept)


def vector(found: Mapping[str, Tensor]) -> Numbers:
    """The numbers of all tensors one after the other, float32."""
    numbers: Numbers = flat(found).float().numpy()
    return numbers


def tensors(numbers: Numbers, form: Form) -> dict[str, Tensor]:
    """A vector as tensors of a form again, each with memory of its own."""
    return {name: part.clone() for name, part in split(torch.from_numpy(numbers), form).items()}


def lengths(form: Form) -> Sequence[int]:
    """How many numbers each tensor of a form has."""
    return [math.prod(shape) for shape in form.values()]


def _held(memory: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """What was kept of each tensor; zero of those that are new or have another shape."""
    return {
        name: memory[name] if name in memory and tuple(memory[name].shape) == shape else torch.zeros(shape)
        for name, shape in form.items()
    }
