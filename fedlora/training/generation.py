"""What an instruction model answers, word for word, and how far its answers are right.

Answers are greedy: the likeliest token each time, up to the end of the turn. ROUGE-L is C.-Y. Lin, "ROUGE: A
Package for Automatic Evaluation of Summaries", Text Summarization Branches Out, 2004,
https://aclanthology.org/W04-1013, with β = 1. It is written here, since the package rouge-score brings nltk
for a stemmer that nobody asks for, and takes every letter beyond a to z for a blank.
"""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from fedlora.core.messages import Task
from fedlora.core.natural_order import in_order
from fedlora.data import Example, Row
from fedlora.models import Base, MultiAdapterModel
from fedlora.seeds import generator
from fedlora.tasks.instruction import turn_ends
from fedlora.training.batches import Micro, micro_batches
from fedlora.training.workers import Workers

LONGEST = 256  # tokens of an answer, whatever is expected
PROMPTS = 4096  # padded tokens of the prompts that are answered together
SHOWN = 300  # letters of a prompt, its last, that an answer keeps
EDGES = " .,;:!?…。，、；：！？'\"`‘’“”„«»()[]{}*_"  # no signs: -5 is not 5, and 5% is not 5
# What a model's makers set for sampling is undone, so that "greedy" means the same for every model.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
GREEDY |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # not used; other values are warned of


@dataclass(frozen=True)
class Answer:
    """One test row and what the model said.

    Args:
        row: its number among the test rows.
        client: whose row it is by nature, where that is known.
        prompt: the end of it.
        expected: the response in the data.
        answer: the model's.
        exact: whether the two match, by `exact`.
        rouge_l: by `rouge_l`, from 0 to 1.
    """

    row: int
    client: str | None
    prompt: str
    expected: str
    answer: str
    exact: bool
    rouge_l: float

    @classmethod
    def to(cls, row: Row, number: int, said: str) -> "Answer":
        """What was said to a row, with its scores."""
        scores = exact(said, row.target), rouge_l(said, row.target)
        return cls(number, row.client, row.source[-SHOWN:], row.target.strip(), said.strip(), *scores)


def chosen(rows: Sequence[Row], count: int, seed: int) -> list[int]:
    """The numbers of `count` rows, or of all if there are fewer: as many of every natural client as can be.

    Args:
        rows: to choose from; those without a client count as one client's.
        count: how many.
        seed: of the order within and between clients.
    """
    turns, taken = {}, Counter[str | None]()
    for number in generator(seed, "answers").permutation(len(rows)).tolist():
        client = rows[number].client
        turns[number] = taken[client]
        taken[client] += 1
    return sorted(sorted(turns, key=turns.__getitem__)[:count])  # stable: one's first rows come first


def answer(
    base: Base,
    task: Task,
    examples: Sequence[Example],
    tokens: int | None = None,
    longest: int | None = None,
) -> list[str]:
    """Answer every prompt with one adapter, in the order of the examples.

    A prompt is the part of an example that has no loss, so it is what training reads before a response. An
    answer may be as long as the longest response of all examples, but no longer than LONGEST tokens, nor than
    the model has positions. Of a prompt that takes all positions the first tokens are left out, with a
    warning, so that it can be answered.

    Args:
        base: the frozen model, a decoder.
        task: the adapter, and the base delta.
        examples: as the base's task encodes them.
        tokens: padded tokens of the prompts of one batch; None takes 4,096.
        longest: tokens of an answer at most, in the place of the longest response of the examples.
    """
    if not examples:
        return []  # without a look at the adapter, which may be no part of this model
    prompts = [(at, Example(base.task.prompt(example), [])) for at, example in enumerate(examples)]
    if longest is None:
        longest = min(LONGEST, max(examples[at].size - prompt.size for at, prompt in prompts))
    prompts, room = _with_room(base, prompts, longest)
    ends = answer_ends(base)
    traits = base.traits if base.traits.prompts else replace(base.traits, limit=0)
    # A padded prompt must stay within the positions and the model's limit to the end of its answer.
    if bounds := [bound for bound in (room, traits.limit) if bound is not None]:
        traits = replace(traits, limit=max(0, min(bounds) - longest))
    said: dict[int, str] = {}
    with MultiAdapterModel(base, [task]), Workers(base) as workers:

        @torch.no_grad()
        def generate(batch: Micro) -> list[str]:
            width = max(prompt.size for _, prompt in batch)
            ids = torch.full((len(batch), width), base.pad_id)
            mask = torch.zeros_like(ids)
            for line, (_, prompt) in enumerate(batch):  # on the left, so that answers begin side by side
                ids[line, width - prompt.size :] = torch.tensor(prompt.input_ids)
                mask[line, width - prompt.size :] = 1
            most = longest if room is None else min(longest, room - width)
            with base.passing():
                full = base.model.generate(
                    input_ids=ids.to(base.device),
                    attention_mask=mask.to(base.device),
                    max_new_tokens=most,
                    eos_token_id=ends,
                    pad_token_id=base.pad_id,
                    **GREEDY,
                )
            return [_text(base, line, ends) for line in full[:, width:].tolist()]

        batches = micro_batches(prompts, tokens or PROMPTS, traits)
        for batch, texts in zip(batches, workers.map(generate, batches), strict=True):
            said |= {at: text for (at, _), text in zip(batch, texts, strict=True)}
    return [said[at] for at in range(len(examples))]


def _with_room(base: Base, prompts: list[tuple[int, Example]], longest: int) -> tuple[Micro, int | None]:
    """The prompts, each with a position left to answer at; and the positions, None where they are enough."""
    room, widest = base.positions, max(prompt.size for _, prompt in prompts)
    if room is None or (base.room is None and widest + longest <= room):
        return prompts, None
    if many := sum(prompt.size >= room for _, prompt in prompts):
        kept = max(1, room - longest)
        warnings.warn(
            f"{many} of {len(prompts)} prompts take all {room} positions of '{base.path}', so only their "
            f"last {kept} tokens are read; write shorter prompts, or say data.max_length={kept}",
            stacklevel=2,
        )
        prompts = [
            (at, Example(prompt.input_ids[-kept:], []) if prompt.size >= room else prompt)
            for at, prompt in prompts
        ]
    return prompts, room


def answer_ends(base: Base) -> list[int]:
    """The ids of the tokens that end an answer, by the chat template, the tokenizer or the model's own word.

    A chat model may end its turn with another token than its tokenizer's end of sequence, and names all of
    them in its generation_config.json.
    """
    own = base.model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*turn_ends(base.tokenizer), *named})


def exact(said: str, expected: str) -> bool:
    """Whether two answers are the same but for case, white space, and punctuation at their ends (EDGES)."""
    return _normal(said) == _normal(expected)


def rouge_l(said: str, expected: str) -> float:
    """F1 of the longest common subsequence of words, in lower case.

    A word is a run of letters and digits of any script, without a stemmer. For ASCII text this is what
    rouge-score gives, except that an answer without words, such as +, counts 1 where it is `exact`.
    """
    one, two = (re.findall(r"[^\W_]+", text.lower()) for text in (said, expected))
    if not one or not two:
        return float(exact(said, expected))
    return 2 * _common(one, two) / (len(one) + len(two))


def scores(answers: Sequence[Answer]) -> dict[str, Any]:
    """How many there are, the means of both scores, and under `answers` the same of each natural client.

    Empty without answers.
    """
    if not answers:
        return {}
    clients = in_order({found.client for found in answers if found.client is not None})
    own = {name: [found for found in answers if found.client == name] for name in clients}
    return {
        **_means(answers),
        "answers": {name: _means(found) for name, found in own.items()},
    }


def _means(answers: Sequence[Answer]) -> dict[str, float]:
    return {
        "answered": len(answers),
        "exact_match": fmean(found.exact for found in answers),
        "rouge_l": fmean(found.rouge_l for found in answers),
    }


def _text(base: Base, ids: list[int], ends: Sequence[int]) -> str:
    """What was said up to the end of the turn; padding may have the same id."""
    said = list(itertools.takewhile(lambda id: id not in ends, ids))
    return str(base.tokenizer.decode(said, skip_special_tokens=True))


def _normal(text: str) -> str:
    plain = " ".join(text.casefold().split())
    return plain.strip(EDGES) or plain  # an answer may be nothing but punctuation


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(two) + 1)  # with the first j words of `two`
    for word in one:
        before = 0
        for j, other in enumerate(two, 1):
            before, best[j] = best[j], before + 1 if word == other else max(best[j], best[j - 1])
    return best[-1]
