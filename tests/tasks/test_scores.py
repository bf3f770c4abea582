"""What tasks say of logits and of a run, by hand."""

import math

import pytest
import torch

from fedlora.data import Example, Row
from fedlora.data.examples import IGNORED
from fedlora.models import load
from fedlora.models.packaged import tiny
from fedlora.models.token_losses import cross_entropy
from fedlora.tasks import Classification, Instruction


@pytest.mark.parametrize(
    ("train", "test", "share"),
    [("aab", "bba", 1 / 3), ("ba", "aab", 2 / 3), ("ba", "bbbb", 0.0), ("a", "a", 1.0)],
)
def test_the_majority_is_that_of_the_training_rows_and_the_first_of_equals(
    train: str, test: str, share: float
) -> None:
    found = Classification().baseline([Row("x", y) for y in train], [Row("x", y) for y in test])
    assert found == {"majority": pytest.approx(share)}


def test_perplexity_is_the_exponential_of_the_loss_and_always_a_number() -> None:
    assert Instruction().metrics(1.0, 0.5) == {"loss": 1.0, "perplexity": math.e, "token_accuracy": 0.5}
    assert math.isfinite(Instruction().metrics(1e4, 0.0)["perplexity"])


class Constant:
    """A model to which all words are as likely."""

    def __init__(self, words: int) -> None:
        self.words = words

    def logits(self, places: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(10 if places is None else len(places), self.words)

    def cross_entropy(self, places: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cross_entropy(self.logits(places), wanted)


@pytest.mark.parametrize("padded", [True, False])
def test_a_row_counts_once_however_many_tokens_it_has(padded: bool) -> None:
    words, task = 7, Instruction()
    rows = [Example([1] * (n + 2), [IGNORED] * 2 + [3] * n) for n in (1, 5)]
    if padded:
        target = torch.tensor([[*r.target, *[IGNORED] * (7 - r.size)] for r in rows])
        losses, shares = task.scores(torch.zeros(2, 7, words), target)
    else:
        losses, shares = task.losses_unpadded(rows, [0, 3], Constant(words))
    torch.testing.assert_close(losses, torch.full((2,), math.log(words)))
    assert shares.tolist() == [0.0, 0.0]


def test_a_row_of_just_the_length_there_is_has_lost_nothing() -> None:
    task, tokenizer = Instruction(), load(tiny(), Classification(), ("x", "y")).tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    row = Row("a cat", "the dog")
    (whole,) = task.encode([row], (), tokenizer, 64)
    for length, cut in ((whole.size + 1, 0), (whole.size, 0), (whole.size - 1, 1)):
        assert task.count_cut([row], task.encode([row], (), tokenizer, length), tokenizer, length) == cut
