"""A frozen pretrained model with its tokenizer and what it is trained for; loaded once a process."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.adapter import digest
from fedlora.data import Batch, Example
from fedlora.errors import ConfigError
from fedlora.models.memory import Memory
from fedlora.models.pack import upload
from fedlora.models.packing import PackedOutputs, Packing
from fedlora.models.products import Products
from fedlora.models.state import put_back
from fedlora.models.traits import Traits
from fedlora.tasks import LearningTask


@dataclass(frozen=True)
class Base:
    """The model that every client shares, frozen and without dropout.

    Args:
        model: a transformers model whose output has `logits`.
        tokenizer: its tokenizer, with a pad token.
        task: what it is trained for.
        heads: modules that are trained, sent and saved whole: the classification head, and whatever else the
            checkpoint did not hold and had to be made up.
        path: where the model came from.
        after: the module from which on the first token of a row is enough, if its head reads no other.
        packing: how the model is fed rows end to end, if it can be.
        traits: how it must be fed.
        products: how the low-rank terms of clients that train together are computed on a GPU; None where
            each client has parameters of its own.
        memory: what fits beside the model on its device.
    """

    model: Any
    tokenizer: Any
    task: LearningTask
    heads: tuple[str, ...]
    path: str
    after: nn.Module | None = None
    packing: Packing | None = None
    traits: Traits = field(default_factory=Traits)
    products: Products | None = None
    memory: Memory = field(default_factory=Memory, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def pad_id(self) -> int:
        """What to pad with: the model's own, by which a decoder's classifier finds a row's last token."""
        pad: int = self.model.config.get_text_config().pad_token_id
        return pad

    @property
    def room(self) -> int | None:
        """How many tokens a row may have; None where the model has no table of positions to run out of."""
        ends = ("position_embeddings", "embed_positions", "positions_embed", "wpe")
        named = (module for name, module in self.model.named_modules() if name.endswith(ends))
        config = self.model.config.get_text_config()
        if getattr(config, "model_type", "") == "mpt":  # makes the slopes of its attention for so many
            slopes: int = config.max_seq_len
            return slopes
        most: int | None = getattr(config, "max_position_embeddings", None)
        if any(name.endswith("embed_positions") for name, _ in self.model.named_buffers()):
            return most  # GPT-J and its like compute their table
        table = next((module for module in named if isinstance(module, nn.Embedding)), None)
        if table is None or most is None:
            return None
        # RoBERTa and its like begin behind the padding.
        return most if table.padding_idx is None else most - table.padding_idx - 1

    @property
    def positions(self) -> int | None:
        """How many tokens a prompt and its answer may have: `room`, or as many as a decoder was trained for.

        A decoder that computes its positions, as Llama does, goes on beyond those without a sign, and says
        less and less. None where its configuration tells nothing of it.
        """
        trained = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return trained if self.room is None else self.room

    def check_lengths(self, examples: Sequence[Example]) -> None:
        """Raise ConfigError where a row is longer than the model has positions."""
        longest = max((example.size for example in examples), default=0)
        if self.room is not None and longest > self.room:
            raise ConfigError(
                f"data.max_length: '{self.path}' has positions for {self.room} tokens, got a row of "
                f"{longest}; say data.max_length={self.room}, which cuts longer rows"
            )

    def fingerprint(self, trained: Sequence[str] = ()) -> str:
        """A digest of the weights, without those of the heads that are trained and so travel anyway."""
        parts = self.model.state_dict().items()
        ours = {name: value for name, value in parts if not name.startswith(tuple(f"{t}." for t in trained))}
        return digest(self.task.name, sorted(ours.items()))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of these rows, padded as the model needs it."""
        return self.task.collate(examples, self.pad_id, self.traits.side)

    def passing(self) -> AbstractContextManager[Any]:
        """Around a pass, or what belongs together such as an answer: the model then is as it was loaded."""
        return put_back(self.model) if self.traits.stateful else nullcontext()

    def logits(self, batch: Batch) -> Tensor:
        """The model's output, (rows, outputs) or (rows, tokens, outputs), in float32 at least."""
        return _precise(self._raw(batch))

    def _raw(self, batch: Batch) -> Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        with self.passing():
            output: Tensor = self.model(**inputs).logits
        return output

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One loss a row, and one score a row such as its share of right answers, both (rows,).

        The task says what they are, in `LearningTask.scores`.
        """
        return self.scores(self._raw(batch), batch)

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """`losses` of logits that are there already, such as a mixture of two models' own."""
        return self.task.scores(self._widened(logits), batch.target.to(self.device))

    def losses_unpadded(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """`losses` of rows that lie end to end; of a decoder, only the response's logits are ever made.

        Not while a client's bank is open that wants padded batches, nor of a model without a `packing`.
        """
        assert self.packing is not None
        ids = torch.tensor([token for example in examples for token in example.input_ids])
        pack = self.packing.kind([example.size for example in examples], self.device)
        outputs = PackedOutputs(self.model, self.packing, upload(ids, self.device), pack)
        starts = list(itertools.accumulate([0, *(example.size for example in examples[:-1])]))
        with self.passing():
            return self.task.losses_unpadded(examples, starts, outputs)

    def _widened(self, logits: Tensor) -> Tensor:
        """Logits as the task takes them: those of rows in float32 at least, those of tokens as they are."""
        return logits if self.task.per_token else _precise(logits)

    @property
    def last(self) -> tuple[str, ...]:
        """The head that gives the output, alone: the last in the model's own order; none without heads."""
        return tuple([name for name, _ in self.model.named_modules() if name in self.heads][-1:])

    def head_state(self, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A copy of the parameters of these heads as loaded, of all by default; in float32 at least."""
        return {
            f"{head}.{name}": _precise(p.detach().clone())
            for head in (self.heads if heads is None else heads)
            for name, p in self.model.get_submodule(head).named_parameters()
        }


def _precise(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
