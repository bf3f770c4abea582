"""Rows of random tokens whose lengths are those of real text, and the rounds that clients make of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.clients import LocalTraining
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base
from fedlora.seeds import generator
from fedlora.training.client import TrainRequest

from .shapes import LABELS

IGNORED = -100
RESPONSE = 0.6  # of a row's tokens
ORDINARY = 2  # the first id that is neither padding nor unknown
Lengths = Callable[[np.random.Generator, int], np.ndarray]


def questions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lengths as of TREC's questions: log-normal, about 10 tokens on the average, 4 to 37."""
    return np.clip(rng.lognormal(np.log(9.3), 0.38, count).round(), 4, 37).astype(int)


def chats(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lengths as of a set of chats: log-normal, a median of 180 tokens, 16 to 1,024."""
    return np.clip(rng.lognormal(np.log(180), 0.9, count).round(), 16, 1024).astype(int)


def sixty_four(rng: np.random.Generator, count: int) -> np.ndarray:
    """Each row 64 tokens."""
    return np.full(count, 64)


def short(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lengths as of the chats, a sixteenth each, for the small models."""
    found: np.ndarray = np.clip(chats(rng, count) // 16, 4, 64)
    return found


@dataclass(frozen=True)
class Batches:
    """What a client's steps hold.

    Args:
        name: as tables have it.
        rows: of a step.
        lengths: how long they are.
    """

    name: str
    rows: int
    lengths: Lengths


FIXED = Batches("4 x 64", 4, sixty_four)
CHAT_1K = Batches("4 chats", 4, chats)  # about 1,000 tokens
CHAT_8K = Batches("32 chats", 32, chats)  # about 8,000 tokens
QUESTIONS = Batches("32 questions", 32, questions)


def examples(base: Base, lengths: Lengths, count: int, client: int) -> list[Example]:
    """A client's rows: for a classifier each with a label, for a decoder each with a response at its end."""
    rng = generator(0, "rows", client)
    vocabulary, found = base.model.config.vocab_size, []
    for size in lengths(rng, count):
        ids = rng.integers(ORDINARY, vocabulary, size).tolist()
        prompt = max(1, round(size * (1 - RESPONSE)))
        found.append(
            Example(ids, [IGNORED] * prompt + ids[prompt:])
            if base.task.per_token
            else Example(ids, int(rng.integers(LABELS)))
        )
    return found


def round_of(
    base: Base, adapters: Sequence[Adapter], batches: Batches, steps: int, short: bool = False
) -> list[TrainRequest]:
    """A round of as many clients as there are adapters, each with rows for so many steps.

    Args:
        base: the model.
        adapters: where each client starts.
        batches: what a step holds.
        steps: of each client.
        short: whether rows are cut to a sixteenth, for a machine without a GPU.
    """

    def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
        found = batches.lengths(rng, count)
        return np.maximum(4, found // 16) if short else found

    return [
        TrainRequest(at, 1, 0, Task(adapter), examples(base, lengths, batches.rows * steps, at))
        for at, adapter in enumerate(adapters)
    ]


def ordinary(batches: Batches, steps: int, micro_tokens: int | None = None) -> LocalTraining:
    """The ordinary client of fedlora, with AdamW and gradients clipped to 1, for such a round."""
    return LocalTraining(lr=1e-4, batch_size=batches.rows, steps=steps, micro_tokens=micro_tokens)


def tokens(requests: Sequence[TrainRequest]) -> tuple[int, int]:
    """All tokens of a round in which each row is read once, and those of them that are response."""
    rows = [row for request in requests for row in request.rows]
    return sum(row.size for row in rows), sum(len(row.target) - row.target.count(IGNORED) for row in rows)
