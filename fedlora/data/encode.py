"""Rows to token ids, and examples to padded batches.

Messages number a row and never quote its text: they may leave the site that holds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fedlora.data.dataset import Kind, Row
from fedlora.errors import ConfigError, DataError, ModelError

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


class Example(NamedTuple):
    """One encoded row.

    Args:
        input_ids: the tokens.
        target: the label's index; or, for an instruction, a label for each token: the token itself in the
            response, -100 before it. The loss shifts them by one, as in transformers.
    """

    input_ids: list[int]
    target: int | list[int]


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Examples padded to the longest: ids and mask n×T, `target` n or n×T."""

    input_ids: Tensor
    attention_mask: Tensor
    target: Tensor


def encode(
    kind: Kind, rows: Sequence[Row], labels: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[Example]:
    """Encode the rows of either kind; `labels` are the data set's, in order."""
    if kind == "classification":
        return encode_classification(rows, labels, tokenizer, max_length)
    return encode_instruction(rows, tokenizer, max_length)


def encode_classification(
    rows: Sequence[Row], labels: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[Example]:
    """Texts cut on the right to `max_length` tokens, each with its label's index."""
    special = tokenizer.num_special_tokens_to_add()
    _check_length(max_length, special + 1, f"a text's token and {special} special tokens")
    index = {label: i for i, label in enumerate(labels)}
    if not rows:
        return []
    texts = [row.source for row in rows]
    tokens = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    examples = []
    for number, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
        if row.target not in index:
            raise DataError(
                f"row {number}: expected one of the labels {', '.join(map(repr, labels)):.300}, "
                f"got {row.target!r}; correct the label or leave the row out"
            )
        if not ids:
            raise DataError(f"row {number}: expected a text with a token, got none; leave the row out")
        examples.append(Example(list(ids), index[row.target]))
    return examples


def encode_instruction(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Prompts and responses, with the loss on the response and its end-of-turn token only.

    The tokenizer's chat template writes the conversation when there is one; else it is the prompt, a line
    break, the response and the end-of-sequence token. What is too long loses the left of its prompt, and the
    right of its response only when that alone is longer than `max_length - 1`, without
    the tokenizer's own warning (verbose).
    """
    _check_length(max_length, 2, "a token of the prompt and one of the response")
    ends = turn_ends(tokenizer)
    examples = []
    for number, row in enumerate(rows):
        prompt, response = _conversation(row, tokenizer, ends)
        if not response:
            raise DataError(f"row {number}: expected a response with a token, got none; leave the row out")
        response = response[: max_length - 1]
        prompt = prompt[-(max_length - len(response)) :]
        examples.append(Example(prompt + response, [IGNORED] * len(prompt) + response))
    return examples


def count_cut(
    kind: Kind, rows: Sequence[Row], examples: Sequence[Example], tokenizer: Tokenizer, max_length: int
) -> int:
    """How many rows lost tokens when `encode` made these examples of them at the same `max_length`.

    Only rows as long as that are read again: no shorter example has lost anything.
    """
    full = [row for row, e in zip(rows, examples, strict=True) if len(e.input_ids) >= max_length - 1]
    if not full:
        return 0
    if kind == "classification":
        whole = tokenizer([row.source for row in full], verbose=False)["input_ids"]
        return sum(len(ids) > max_length for ids in whole)
    ends = turn_ends(tokenizer)
    return sum(sum(map(len, _conversation(row, tokenizer, ends))) > max_length for row in full)


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """The ids of the tokens that end an answer: that of the chat template, if any, and end of sequence.

    The template's is the first special token behind an answer, whatever the answer is.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("expected a tokenizer with an end-of-sequence token, got none; set its eos_token")
    if not tokenizer.chat_template:
        return [tokenizer.eos_token_id]
    one, other = (
        list(tokenizer.apply_chat_template(_turns("Yes?", answer), return_dict=False))
        for answer in ("yes", "no")
    )
    if one == other:  # a vocabulary without these words
        return [tokenizer.eos_token_id]
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    behind = [id for id in one[len(one) - same :] if id in special]
    return [*dict.fromkeys([*behind[:1], tokenizer.eos_token_id])]


def collate(examples: Sequence[Example], pad_id: int, side: Side = "right") -> Batch:
    """Pad to the longest example, on the side that the model needs (`Base.collate` knows it).

    Padding is known by the mask, not by its id: `pad_id` may equal the end-of-sequence token's.
    """
    inputs = [example.input_ids for example in examples]
    targets = [example.target for example in examples]
    target = _pad(targets, IGNORED, side) if isinstance(targets[0], list) else torch.tensor(targets)
    mask = _pad([[1] * len(ids) for ids in inputs], 0, side)
    return Batch(_pad(inputs, pad_id, side), mask, target)


def _check_length(max_length: int, least: int, why: str) -> None:
    if max_length < least:
        raise ConfigError(f"max_length: expected at least {least} ({why}), got {max_length}")


def _turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _conversation(row: Row, tokenizer: Tokenizer, ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and of the response up to the end of its turn; no response, no end.

    Args:
        row: a prompt and its response.
        tokenizer: the model's.
        ends: by `turn_ends`.
    """
    end, eos = ends[0], tokenizer.eos_token_id
    answer = list(tokenizer(row.target, add_special_tokens=False, verbose=False)["input_ids"])
    if not answer:
        return [], []
    if not tokenizer.chat_template:
        prompt = list(tokenizer(row.source + "\n", verbose=False)["input_ids"])
        return (prompt[:-1] if prompt[-1:] == [eos] else prompt), [*answer, eos]
    turns = _turns(row.source, row.target)
    named: dict[str, Any] = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
    prompt = list(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **named))
    full = list(tokenizer.apply_chat_template(turns, **named))
    response = full[len(prompt) :]
    if full[: len(prompt)] != prompt or not response:  # the template rewrites earlier turns
        return prompt, [*answer, end]
    last = max((at for at, id in enumerate(response) if id in ends), default=len(response) - 1)
    return prompt, response[: last + 1]  # without what the template writes after the turn


def _pad(rows: Sequence[Any], value: int, side: Side) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(padded.shape[1] - len(row), None)
        padded[i, place] = torch.tensor(row, dtype=torch.long)
    return padded
