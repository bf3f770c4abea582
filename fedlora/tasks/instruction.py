"""Instructions: write the response to a prompt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.data.cells import text_in
from fedlora.data.dataset import Row
from fedlora.data.examples import IGNORED, Example, Tokenizer
from fedlora.errors import DataError, ModelError
from fedlora.tasks.base import LearningTask, Outputs, check_length


@dataclass(frozen=True)
class Instruction(LearningTask):
    """Learn the tokens of a response, and of the end of its turn, by cross-entropy.

    The target of an example is a list: the token itself in the response, -100 before it. The loss shifts it
    by one, as transformers does.
    """

    name = "instruction"
    columns = ("prompt", "response")
    headline = "perplexity"
    more_is_better = False
    per_token = True
    generates = True
    new_head = False
    auto = "AutoModelForCausalLM"
    model = "decoder"
    needs = "instructions need a decoder, such as model=smollm2"
    peft_type = "CAUSAL_LM"
    cut = "start of the prompt"

    def row(self, record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
        """A prompt and its response."""
        response = text_in(record, columns["response"], where, numbers=True)
        return Row(text_in(record, columns["prompt"], where), response)

    def encode(
        self, rows: Sequence[Row], labels: Sequence[str], tokenizer: Tokenizer, max_length: int
    ) -> list[Example]:
        """Prompts and responses, with the loss on the response and its end-of-turn token alone.

        The tokenizer's chat template writes the conversation where there is one. Otherwise it is the prompt,
        a line break, the response and the end-of-sequence token. A row that is too long loses the left of its
        prompt, and the right of its response only when that alone is longer than `max_length - 1`, without
        the tokenizer's own warning (verbose).

        Raises:
            ConfigError: `max_length` leaves no room for a prompt and a response.
            DataError: a response has no token.
            ModelError: the tokenizer has no end-of-sequence token.
        """
        check_length(max_length, 2, "a token of the prompt and one of the response")
        ends = turn_ends(tokenizer)
        examples = []
        for number, row in enumerate(rows):
            prompt, response = _conversation(row, tokenizer, ends)
            if not response:
                raise DataError(
                    f"row {number}: expected a response with a token, got none; leave the row out"
                )
            response = response[: max_length - 1]
            prompt = prompt[-(max_length - len(response)) :]
            examples.append(Example(prompt + response, [IGNORED] * len(prompt) + response))
        return examples

    def encode_sources(self, sources: Sequence[Any], tokenizer: Tokenizer, max_length: int) -> list[Example]:
        """Prompts, each with a response of a blank."""
        return self.encode([Row(source, " ") for source in sources], (), tokenizer, max_length)

    def count_cut(
        self, rows: Sequence[Row], examples: Sequence[Example], tokenizer: Tokenizer, max_length: int
    ) -> int:
        """How many rows lost tokens; those of `max_length - 1` tokens may have lost some of the response."""
        full = [row for row, e in zip(rows, examples, strict=True) if e.size >= max_length - 1]
        if not full:
            return 0
        ends = turn_ends(tokenizer)
        return sum(sum(map(len, _conversation(row, tokenizer, ends))) > max_length for row in full)

    def probe(self, ids: list[int], number: int) -> Example:
        """A response to the first token."""
        return Example(ids, [IGNORED, *ids[1:]])

    def heads(self, model: Any, missing: Sequence[str], path: str) -> tuple[str, ...]:
        """None: the checkpoint has the whole model.

        Raises:
            ModelError: it lacks a part.
        """
        if missing:
            raise ModelError(
                f"model: {self.needs}; '{path}' is no complete causal language model, it lacks "
                f"{sorted(missing)[:3]}"
            )
        return ()

    def scores(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy over a row's own response tokens, and the share of them that is right.

        So a row counts once, whatever its length and its batch.
        """
        logits, target = logits[:, :-1], target[:, 1:]
        rows, places = (target != IGNORED).nonzero(as_tuple=True)
        found, wanted = logits[rows, places], target[rows, places]
        found = found if found.dtype == torch.float64 else found.float()
        losses = F.cross_entropy(found, wanted, reduction="none")
        return _by_row(losses, found.argmax(-1) == wanted, rows, len(target))

    def losses_unpadded(
        self, examples: Sequence[Example], starts: Sequence[int], outputs: Outputs
    ) -> tuple[Tensor, Tensor]:
        """`scores`; no logits but those of the response are ever made."""
        predicted = [
            (row, start + at - 1, token)  # a token is foretold one place before it
            for row, (start, example) in enumerate(zip(starts, examples, strict=True))
            for at, token in enumerate(example.target)
            if at and token != IGNORED
        ]
        rows, places, wanted = torch.tensor(predicted, dtype=torch.long).view(-1, 3).T
        return _by_row(*outputs.cross_entropy(places, wanted), rows, len(examples))

    def metrics(self, loss: float, score: float) -> dict[str, float]:
        """The loss, its exponential, and the share of right tokens."""
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": score}

    def baseline(self, train: Sequence[Row], test: Sequence[Row]) -> dict[str, float | None]:
        """There is no most frequent answer to compare with."""
        return {"majority": None}

    def prompt(self, example: Example) -> list[int]:
        """The part of an example that has no loss."""
        return example.input_ids[: example.target.count(IGNORED)]


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


def _by_row(losses: Tensor, right: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's mean of its tokens' losses, and its share of right ones; zeros without any.

    Args:
        losses: (tokens,).
        right: (tokens,).
        rows: the row of each token, (tokens,); counted where it is, so best on the CPU.
        count: of rows.
    """
    share = (1 / rows.bincount(minlength=count).to(losses.dtype)[rows]).to(losses.device)
    rows, empty = rows.to(losses.device), losses.new_zeros(count)
    return empty.index_add(0, rows, losses * share), empty.index_add(0, rows, right * share)
