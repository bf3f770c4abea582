"""Whether a model can be fed rows end to end, without padding, how they then attend, and what it says.

It is tried when a model is loaded, not believed: on rows of several lengths its logits must be those of the
padded batch. Models that fail are fed padded batches.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models.attention import end_to_end
from fedlora.models.first_token import keep_first, near
from fedlora.models.pack import Pack, VarlenPack, upload
from fedlora.models.token_losses import PIECE, cross_entropy, cross_entropy_in_pieces

LENGTHS = (5, 1, 3)  # of the rows on which it is tried
FAILURES = (RuntimeError, IndexError, ValueError, TypeError)  # of a model that lacks an argument, or a shape


@dataclass(frozen=True)
class Packing:
    """How a model is fed rows end to end.

    Args:
        offset: the position of a row's first token.
        kind: how rows attend.
        vocabulary: a decoder's output layer, if its logits are those of the model's last states and nothing
            more, so that they can be made in pieces.
    """

    offset: int
    kind: type[Pack] = Pack
    vocabulary: nn.Linear | None = None


@torch.no_grad()
def packing_of(model: Any, after: nn.Module | None) -> Packing | None:
    """How a model can be fed packs; None if it cannot.

    Args:
        model: one that attends our way; a decoder, or a classifier by the first token.
        after: the module from which on that token is enough.
    """
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if types or getattr(config, "sliding_window", None) is not None:
        return None  # tokens far apart do not see each other, which short rows would not show
    pad = getattr(config, "pad_token_id", None) or 0
    everything = torch.arange(sum(LENGTHS))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = 1 + pad + everything % max(1, int(config.vocab_size) - 1 - pad)
    padded = torch.full(real.shape, pad).masked_scatter(real, ids)
    device = model.device
    ids, everything, real = ids.to(device), everything.to(device), real.to(device)
    whole = model(input_ids=padded.to(device), attention_mask=real.long()).logits
    if after is None:
        whole = whole[real]
    varlen = device.type == "cuda" and whole.dtype in (torch.bfloat16, torch.float16)
    with ExitStack() as stack:
        if after is not None:
            stack.callback(keep_first(after).remove)
        for kind in (VarlenPack, Pack) if varlen else (Pack,):
            for offset in (0, pad + 1):  # BERT and decoders; RoBERTa and its like
                pack = kind(LENGTHS, device)
                try:
                    found = _logits(model, ids, pack, offset, None if after else everything)
                except FAILURES:
                    continue
                if found.shape == whole.shape and near(found, whole):
                    vocabulary = None if after else _vocabulary(model, ids, pack, offset, found)
                    return Packing(offset, kind, vocabulary)
    return None


class PackedOutputs:
    """What a model makes of rows that lie end to end, for `LearningTask.losses_unpadded`.

    Args:
        model: as `packing_of` found it; a classifier's last layer keeps the first token alone.
        packing: what `packing_of` found.
        ids: all tokens, row after row.
        pack: how they lie.
    """

    def __init__(self, model: Any, packing: Packing, ids: Tensor, pack: Pack) -> None:
        self._model, self._packing, self._ids, self._pack = model, packing, ids, pack

    def logits(self, places: Tensor | None) -> Tensor:
        """A decoder's logits at these places among all tokens, (places, vocabulary), in the model's dtype.

        Of None a classifier's, (rows, labels), in float32 at least.
        """
        at = None if places is None else upload(places, self._pack.device)
        found = _logits(self._model, self._ids, self._pack, self._packing.offset, at)
        return found.float() if at is None and found.dtype != torch.float64 else found

    def cross_entropy(self, places: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Each place's cross-entropy, and whether its likeliest token is the wanted one, both (places,)."""
        vocabulary = self._packing.vocabulary
        wanted = upload(wanted, self._pack.device)
        if vocabulary is None or len(places) * vocabulary.out_features <= PIECE:
            return cross_entropy(self.logits(places), wanted)
        states = _states(self._model, self._ids, self._pack, self._packing.offset)
        return cross_entropy_in_pieces(states[upload(places, self._pack.device)], vocabulary, wanted)


def _inputs(ids: Tensor, pack: Pack, offset: int) -> dict[str, Tensor]:
    # Without a mask, transformers looks into the positions for rows end to end, and waits for the device.
    everything = torch.ones_like(ids)[None]
    return {
        "input_ids": ids[None],
        "position_ids": pack.positions[None] + offset,
        "attention_mask": everything,
    }


def _logits(model: Any, ids: Tensor, pack: Pack, offset: int, kept: Tensor | None) -> Tensor:
    named: dict[str, Any] = {} if kept is None else {"logits_to_keep": kept, "use_cache": False}
    with end_to_end(pack):
        found: Tensor = model(**_inputs(ids, pack, offset), **named).logits
    return found if kept is None else found[0]


def _states(model: Any, ids: Tensor, pack: Pack, offset: int) -> Tensor:
    """The states of all tokens before the output layer, (all tokens, width)."""
    with end_to_end(pack):
        found: Tensor = model.base_model(**_inputs(ids, pack, offset), use_cache=False).last_hidden_state
    return found[0]


def _vocabulary(model: Any, ids: Tensor, pack: Pack, offset: int, found: Tensor) -> nn.Linear | None:
    """The output layer, if it makes just these logits of the last states: no scale, no cap on them."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or model.base_model is model:
        return None
    try:
        states = _states(model, ids, pack, offset)
        return layer if torch.equal(layer(states), found) else None
    except (*FAILURES, AttributeError):
        return None
