"""Whether a model can be fed rows end to end, without padding, and what it then says.

It is tried when a model is loaded, not believed: on rows of several lengths its logits must be those of the
padded batch. Models that fail, and all on a GPU, are fed padded batches.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.models.attention import Pack, end_to_end
from fedlora.models.first_token import keep_first, near

LENGTHS = (5, 1, 3)  # of the rows on which it is tried


def offset_of(model: Any, after: nn.Module | None) -> int | None:
    """The position of a row's first token, if the model can be fed packs; None if it cannot.

    Args:
        model: one that attends our way; a decoder, or a classifier by the first token.
        after: the module from which on that token is enough.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) is not None:
        return None  # tokens far apart do not see each other, which short rows would not show
    pad = getattr(config, "pad_token_id", None) or 0
    pack = Pack(LENGTHS)
    everything = torch.arange(sum(LENGTHS))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = 1 + pad + everything % max(1, int(config.vocab_size) - 1 - pad)
    padded = torch.full(real.shape, pad).masked_scatter(real, ids)
    with torch.no_grad():
        whole = model(input_ids=padded, attention_mask=real.long()).logits
        if after is None:
            whole = whole[real]
        with ExitStack() as stack:
            if after is not None:
                stack.callback(keep_first(after).remove)
            for offset in (0, pad + 1):  # BERT and decoders; RoBERTa and its like
                try:
                    found = logits(model, ids, pack, offset, None if after else everything)
                except (RuntimeError, IndexError, ValueError, TypeError):  # it lacks an argument, or a shape
                    continue
                if found.shape == whole.shape and near(found, whole):
                    return offset
    return None


def logits(model: Any, ids: Tensor, pack: Pack, offset: int, kept: Tensor | None) -> Tensor:
    """A classifier's logits, (rows, labels), or a decoder's at some tokens, (kept, vocabulary).

    Args:
        model: as `offset_of` found it; a classifier's last layer keeps the first token alone.
        ids: all tokens, row after row.
        pack: how they lie.
        offset: the position of a row's first token.
        kept: the tokens whose logits a decoder is to give; None for a classifier.
    """
    named: dict[str, Any] = {"input_ids": ids[None], "position_ids": pack.positions[None] + offset}
    if kept is not None:
        named |= {"logits_to_keep": kept, "use_cache": False}
    with end_to_end(pack):
        found: Tensor = model(**named).logits
    return found if kept is None else found[0]
