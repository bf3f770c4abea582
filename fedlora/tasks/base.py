"""The interface of a learning task: what is learnt from a row, from its columns in a file to its metrics."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedlora.data.dataset import Row
from fedlora.data.examples import Batch, Example, Side, Tokenizer, collate
from fedlora.errors import ConfigError, DataError, ModelError


class Outputs(Protocol):
    """What a model says of rows that are fed end to end."""

    def logits(self, places: Tensor | None) -> Tensor:
        """The logits of tokens, by their places among all: (k,) to (k, outputs), in the model's dtype.

        Of None the rows' logits, (n, outputs), in float32 at least.
        """

    def cross_entropy(self, places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Each of these tokens' cross-entropy, and whether its likeliest output is the wanted one: (k,) both.

        The logits are made in pieces where they are many.
        """


class LearningTask(ABC):
    """What is learnt. A subclass is a frozen dataclass in a file of its own; its fields are its settings.

    What is given here suits a text that has one target as a whole, learnt by an encoder with a new head. A
    subclass has at least `name`, `columns`, `headline`, `row`, `scores` and `metrics`. Tasks of one class
    with equal settings are equal and have one hash, so that runs of one process share a loaded model.

    Attributes:
        name: how the files of a run and messages call the task.
        columns: the roles of the columns that a row is made of, what the model reads first. `data.ROLE`, or
            `ROLE=` in Python, names the column of a file.
        headline: the metric that runs are compared by, a key of `metrics`.
        more_is_better: whether a higher headline metric is better.
        score: what the second number of `scores` is called in the clients' own evaluations, as
            `local_accuracy`.
        labelled: whether every row has one of a few labels as its target, and `Example.target` is the label's
            index. One row of each label then stays in training when test rows are held out.
        per_token: whether the model gives logits for each token, (n, T, outputs), and not for each row,
            (n, outputs).
        generates: whether the model writes text. It must then not see the tokens that follow.
        new_head: whether the model gets a head that its checkpoint may lack. It is drawn from the run's seed,
            and the model's configuration is saved beside the adapter, with the names of the outputs.
        auto: the name of the class of transformers that loads the model.
        model: what such a model is called in messages.
        needs: which model the task needs, as a clause for messages.
        peft_type: the name of PEFT's `TaskType`.
        cut: what a row that is too long loses, for messages.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    headline: ClassVar[str]
    more_is_better: ClassVar[bool] = True
    score: ClassVar[str] = "accuracy"
    labelled: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    new_head: ClassVar[bool] = True
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    model: ClassVar[str] = "text classifier"
    needs: ClassVar[str] = "this task needs a text classifier, such as model=minilm"
    peft_type: ClassVar[str] = "SEQ_CLS"
    cut: ClassVar[str] = "end"

    # Rows

    @abstractmethod
    def row(self, record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
        """The row of one record of a file.

        Args:
            record: its cells by column.
            columns: the column of each role; the record has all of them.
            where: file and line, which open the message of an error.

        Raises:
            DataError: a cell cannot be used (`fedlora.data.cells.text_in` raises it for texts).
        """

    def labels(
        self, train: Sequence[Row], test: Sequence[Row], declared: Sequence[str] | None, where: str
    ) -> tuple[str, ...]:
        """The names of the model's outputs, in their order; none here.

        Args:
            train: the training rows; none where they are at other sites.
            test: the test rows.
            declared: all names, if the user gives them (`data.labels`).
            where: the data set, which opens the message of an error.

        Raises:
            DataError: the rows do not fit the names, or each other.
        """
        return ()

    def check_rows(self, rows: Sequence[Row], labels: Sequence[str], where: str) -> None:
        """Check the rows of one site against the run's `labels`; nothing is asked of them here.

        Raises:
            DataError: a row does not fit.
        """
        return

    def group(self, row: Row) -> str | None:
        """By what a partition by labels deals a row: the row's natural client here, for want of a label."""
        return row.client

    # Examples

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[Any]:
        """What the loss compares the model's outputs with, one a row: a number, or a tuple of numbers.

        It is the row's own target here.

        Raises:
            DataError: a row has a target that cannot be used; its number is told, and none of its words,
                since messages leave the site that holds it.
        """
        return [row.target for row in rows]

    def encode(
        self, rows: Sequence[Row], labels: Sequence[str], tokenizer: Tokenizer, max_length: int
    ) -> list[Example]:
        """The rows as examples; here the tokens of each text, cut on the right to `max_length` of them.

        Args:
            rows: the rows.
            labels: the data set's, in their order.
            tokenizer: the model's.
            max_length: the most tokens that an example may have, special ones included.

        Raises:
            ConfigError: `max_length` leaves no room for a text.
            DataError: a row cannot be used, with the row's number alone, as in `targets`.
        """
        tokens = _tokens([row.source for row in rows], tokenizer, max_length)
        return [Example(*both) for both in zip(tokens, self.targets(rows, labels), strict=True)]

    def encode_sources(self, sources: Sequence[Any], tokenizer: Tokenizer, max_length: int) -> list[Example]:
        """What the model reads of rows whose targets nobody knows, with made-up ones, to be predicted."""
        return [self.probe(ids, 0) for ids in _tokens(sources, tokenizer, max_length)]

    def count_cut(
        self, rows: Sequence[Row], examples: Sequence[Example], tokenizer: Tokenizer, max_length: int
    ) -> int:
        """How many rows lost tokens when `encode` made these examples of them with the same `max_length`.

        Only rows that are about as long as that are read again: no shorter one has lost anything.
        """
        full = [row.source for row, e in zip(rows, examples, strict=True) if e.size >= max_length - 1]
        if not full:
            return 0
        return sum(len(ids) > max_length for ids in tokenizer(full, verbose=False)["input_ids"])

    def collate(self, examples: Sequence[Example], pad_id: int, side: Side) -> Batch:
        """A batch of these examples, padded with `pad_id` on this side to the longest."""
        return collate(examples, pad_id, side)

    def probe(self, ids: list[int], number: int) -> Example:
        """An example of these tokens with a made-up target, to try a model on; `number` counts from 0."""
        return Example(ids, number % 2)

    # The model

    def options(self, labels: Sequence[str]) -> dict[str, Any]:
        """Arguments of `from_pretrained` that make the model's outputs those of this task."""
        return {}

    def heads(self, model: Any, missing: Sequence[str], path: str) -> tuple[str, ...]:
        """The modules to train whole: here each one beside the encoder, and what the checkpoint lacks.

        Args:
            model: of the class `auto`.
            missing: the parameters that the checkpoint does not have, or has in other shapes.
            path: where the model came from, for messages.

        Raises:
            ModelError: the checkpoint cannot be used.
        """
        prefix = model.base_model_prefix
        heads = [n for n, m in model.named_children() if n != prefix and any(True for _ in m.parameters())]
        for name in sorted({".".join(key.split(".")[:2]) for key in missing if key.startswith(f"{prefix}.")}):
            lacks = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()]
            if not set(lacks) <= set(missing):
                raise ModelError(
                    f"model.path: the checkpoint '{path}' lacks a part of {name}, or has other shapes"
                )
            heads.append(name)
        return tuple(sorted(set(heads)))

    # Losses and metrics

    @abstractmethod
    def scores(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """One loss a row, and one number a row that is reported, such as whether it is right: both (n,).

        A row's numbers depend on this row alone: clients are trained in one batch, and privacy is by row.

        Args:
            logits: (n, outputs) in float32 at least; with `per_token` (n, T, outputs) in the model's dtype.
            target: as in `Batch`.
        """

    def losses_unpadded(
        self, examples: Sequence[Example], starts: Sequence[int], outputs: Outputs
    ) -> tuple[Tensor, Tensor]:
        """`scores` of rows that are fed end to end, without padding.

        Args:
            examples: the rows.
            starts: the place of each row's first token among all tokens.
            outputs: what the model says of them; to be asked once.
        """
        logits = outputs.logits(None)
        target = torch.tensor([example.target for example in examples])
        return self.scores(logits, target.to(logits.device))

    @abstractmethod
    def metrics(self, loss: float, score: float) -> dict[str, float]:
        """The metrics by name, from the means over the rows of the two numbers of `scores`."""

    def baseline(self, train: Sequence[Row], test: Sequence[Row]) -> dict[str, float | None]:
        """The headline metric on the test rows of an answer that reads no row, by the answer's name.

        None where it cannot be known, since the training rows are elsewhere; nothing here.
        """
        return {}

    # Answers

    def predicted(self, logits: Tensor, labels: Sequence[str]) -> list[Any]:
        """What the model says of each row: its outputs as numbers here, one list a row.

        Args:
            logits: as in `scores`.
            labels: the data set's, in their order.
        """
        found: list[Any] = logits.tolist()
        return found

    def prompt(self, example: Example) -> list[int]:
        """The tokens that are read before an answer is written, where the task generates."""
        return example.input_ids


def _tokens(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
    """The tokens of each text, cut on the right."""
    special = tokenizer.num_special_tokens_to_add()
    check_length(max_length, special + 1, f"a text's token and {special} special tokens")
    if not texts:
        return []
    tokens = [list(ids) for ids in tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]]
    for number, ids in enumerate(tokens):
        if not ids:
            raise DataError(f"row {number}: expected a text with a token, got none; leave the row out")
    return tokens


def check_length(max_length: int, least: int, why: str) -> None:
    """Raise ConfigError where a row may have fewer than `least` tokens."""
    if max_length < least:
        raise ConfigError(f"max_length: expected at least {least} ({why}), got {max_length}")
