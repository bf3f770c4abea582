"""A frozen pretrained model with its tokenizer and what it is trained for; loaded once a process."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.core.adapter import digest
from fedlora.data import Batch, Example, Kind, collate
from fedlora.data.encode import IGNORED
from fedlora.errors import ConfigError
from fedlora.models.attention import Pack
from fedlora.models.packing import logits
from fedlora.models.state import put_back
from fedlora.models.traits import Traits


@dataclass(frozen=True)
class Base:
    """The model that every client shares, frozen and without dropout.

    Args:
        model: a transformers model whose output has `logits`.
        tokenizer: its tokenizer, with a pad token.
        kind: "classification" (one label a text) or "instruction" (the response's tokens).
        heads: modules that are trained, sent and saved whole: the classification head, and whatever else the
            checkpoint did not hold and had to be made up.
        path: where the model came from.
        after: the module from which on the first token of a row is enough, if its head reads no other.
        offset: the position of a row's first token, if the model can be fed rows end to end.
        traits: how it must be fed.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    heads: tuple[str, ...]
    path: str
    after: nn.Module | None = None
    offset: int | None = None
    traits: Traits = field(default_factory=Traits)

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

    def check_lengths(self, examples: Sequence[Example]) -> None:
        """Raise ConfigError where a row is longer than the model has positions."""
        longest = max((len(example.input_ids) for example in examples), default=0)
        if self.room is not None and longest > self.room:
            raise ConfigError(
                f"data.max_length: '{self.path}' has positions for {self.room} tokens, got a row of "
                f"{longest}; say data.max_length={self.room}, which cuts longer rows"
            )

    def fingerprint(self, trained: Sequence[str] = ()) -> str:
        """A digest of the weights, without those of the heads that are trained and so travel anyway."""
        parts = self.model.state_dict().items()
        ours = {name: value for name, value in parts if not name.startswith(tuple(f"{t}." for t in trained))}
        return digest(self.kind, sorted(ours.items()))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of these rows, padded as the model needs it."""
        return collate(examples, self.pad_id, self.traits.side)

    def passing(self) -> AbstractContextManager[Any]:
        """Around a pass, or what belongs together such as an answer: the model then is as it was loaded."""
        return put_back(self.model) if self.traits.stateful else nullcontext()

    def logits(self, batch: Batch) -> Tensor:
        """The model's output, (rows, labels) or (rows, tokens, vocabulary), in float32 at least."""
        return _precise(self._raw(batch))

    def _raw(self, batch: Batch) -> Tensor:
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        with self.passing():
            output: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return output

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One loss a row, and one share of right answers a row, both (rows,).

        Classification: cross-entropy of the label. Instruction: mean cross-entropy over the row's own
        response tokens, so that a row counts once whatever its length and its batch; the share is of tokens.
        """
        return self.scores(self._raw(batch), batch)

    def scores(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """`losses` of logits that are there already, such as a mixture of two models' own."""
        target = batch.target.to(self.device)
        if self.kind == "classification":
            return _of_labels(logits, target)
        logits, target = logits[:, :-1], target[:, 1:]
        rows, places = (target != IGNORED).nonzero(as_tuple=True)
        return _by_row(logits[rows, places], target[rows, places], rows, len(target))

    def losses_unpadded(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """`losses` of rows that lie end to end; of a decoder, only the response's logits are ever made.

        Not while a client's bank is open that wants padded batches, nor of a model without an `offset`.
        """
        ids = torch.tensor([token for example in examples for token in example.input_ids])
        pack = Pack([len(example.input_ids) for example in examples])
        if self.kind == "classification":
            target = torch.tensor([example.target for example in examples])
            return _of_labels(self._packed(ids, pack, None), target)
        told = [
            (row, start + at - 1, token)  # a token is foretold one place before it
            for row, (start, example) in enumerate(zip(pack.starts.tolist(), examples, strict=True))
            for at, token in enumerate(_tokens(example))
            if at and token != IGNORED
        ]
        rows, places, wanted = torch.tensor(told, dtype=torch.long).view(-1, 3).T
        return _by_row(self._packed(ids, pack, places), wanted, rows, len(examples))

    def _packed(self, ids: Tensor, pack: Pack, kept: Tensor | None) -> Tensor:
        assert self.offset is not None
        with self.passing():
            return logits(self.model, ids, pack, self.offset, kept)

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


def _of_labels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row's label, and whether it is the likeliest one."""
    logits = _precise(logits)
    return F.cross_entropy(logits, target, reduction="none"), (logits.argmax(-1) == target).to(logits.dtype)


def _by_row(logits: Tensor, wanted: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's mean of its tokens' cross-entropies, and its share of right ones; zeros without any."""
    logits = _precise(logits)
    each, right = F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted
    share = 1 / rows.bincount(minlength=count).clamp_min(1).to(each.dtype)[rows]
    empty = logits.new_zeros(count)
    return empty.index_add(0, rows, each * share), empty.index_add(0, rows, right * share)


def _tokens(example: Example) -> list[int]:
    assert isinstance(example.target, list)
    return example.target


def _precise(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
