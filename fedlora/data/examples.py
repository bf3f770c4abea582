"""Encoded rows, and the padded batches that a model reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

IGNORED = -100  # torch's cross entropy leaves these positions out
Side = Literal["right", "left"]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any
    eos_token_id: Any
    added_tokens_decoder: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens of a text, or of a list of texts."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens of a conversation."""

    def num_special_tokens_to_add(self) -> int:
        """How many tokens are put around a text."""


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded row.

    Args:
        input_ids: the tokens.
        target: what the learning task makes of the row's target. A list holds one target a token; anything
            else, such as the index of a label, a number or a tuple of numbers, belongs to the row as a whole.

    Attributes:
        size: the number of tokens, by which rows are sorted and cut into micro-batches.
    """

    input_ids: list[int]
    target: Any
    size: int = field(init=False, repr=False, compare=False)  # kept, since the trainer asks for it every step

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.input_ids))


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Examples padded to a common length.

    Args:
        inputs: the model's arguments by name, each with n rows: `input_ids` and `attention_mask`, (n, T).
        target: (n,), (n, values) or, with a target for each token, (n, T).
    """

    inputs: Mapping[str, Tensor]
    target: Tensor


def collate(examples: Sequence[Example], pad_id: int, side: Side = "right") -> Batch:
    """Pad to the longest example, on the side that the model needs (`Base.collate` knows it).

    The mask says what is padding, and not its id: `pad_id` may equal the id of the end-of-sequence token.
    Targets for each token are padded with -100.
    """
    ids = [example.input_ids for example in examples]
    targets = [example.target for example in examples]
    target = _pad(targets, IGNORED, side) if isinstance(targets[0], list) else torch.tensor(targets)
    mask = _pad([[1] * len(row) for row in ids], 0, side)
    return Batch({"input_ids": _pad(ids, pad_id, side), "attention_mask": mask}, target)


def _pad(rows: Sequence[Any], value: int, side: Side) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(padded.shape[1] - len(row), None)
        padded[i, place] = torch.tensor(row, dtype=torch.long)
    return padded
