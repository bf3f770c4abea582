"""Architectures that must be fed with care, and those that are refused; a part of the table of `zoo_table`.

They keep something in their modules, feed layers tokens first, read padding, or treat a long row in another
way than a short one. `zoo_claims.long`, `square` and `threads` are about them.
"""

from typing import Any

from zoo_entry import SIZES, Entry, decoder, encoder
from zoo_sizes import APART, BART, GROUPED, IMAGES, LATENT, T5

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [8.0] * 4,
    "short_factor": [1.0] * 4,
    "original_max_position_embeddings": 16,
}
ALONE = "one thread trains it"
PADDING = ("reads padding",)
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}


def image(config: str, **sizes: Any) -> Entry:
    """A model of images, which is refused."""
    said = {"load": f"is a model of the kind '{config.lower()}', of which transformers has no text"}
    return Entry(
        config,
        f"{config}ForImageClassification",
        "classification",
        {**IMAGES, **sizes},
        drop=tuple(SIZES) if sizes else (),
        refused=said,
        tokenizer=False,
    )


ODD: dict[str, Entry] = {
    "deepseek-v32": decoder(
        "DeepseekV32",
        sizes={**LATENT, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
        targets=("q_a_proj", "kv_a_proj_with_mqa"),
        fed=("more than 7 tokens",),
        single=True,
        fast=True,
    ),
    "recurrentgemma": decoder(
        "RecurrentGemma",
        sizes={
            "num_hidden_layers": 3,
            "lru_width": 32,
            "attention_window_size": 8,
            "head_dim": 8,
            "num_key_value_heads": 1,
        },
        left_out="model.layers.*.temporal_block.rg_lru (no linear layers)",
        fed=("more than 65 tokens", ALONE),
        single=True,
        fast=True,
    ),
    "phi3-longrope": decoder(
        "Phi3",
        sizes={
            **GROUPED,
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONG_ROPE,
        },
        fed=("more than 16 tokens", ALONE),
        fast=True,
    ),
    "llama-dynamic": decoder(
        "Llama",
        sizes={**GROUPED, "max_position_embeddings": 16, "rope_parameters": DYNAMIC_ROPE},
        fed=("more than 16 tokens", ALONE),
    ),
    "xlnet": encoder(
        "XLNet",
        "LMHeadModel",
        sizes={"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        drop=tuple(SIZES),
        left_out="transformer.layer.*.rel_attn (no linear layers)",
        special="$A <end> <cls>",
        single=True,
        refused=APART,
        fast=True,
    ),
    "longformer": encoder(
        "Longformer",
        sizes={"pad_token_id": 1, "attention_window": [8, 8], "sep_token_id": 2},
        targets=("query", "value"),
        single=True,
        refused=APART,
    ),
    "fnet": encoder("FNet", fed=PADDING),
    "convbert": encoder("ConvBert", sizes={"embedding_size": 16}, fed=PADDING),
    "mobilebert": encoder(
        "MobileBert", sizes={"embedding_size": 16, "intra_bottleneck_size": 16}, fed=PADDING
    ),
    "bigbird-sparse": encoder(
        "BigBird",
        sizes={"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
        left_out="bert.pooler (no part in the loss)",
        fed=("more than 17 tokens", ALONE),
    ),
    "bert-mlm-as-decoder": decoder(
        "Bert", "ForMaskedLM", refused={"load": "sees the tokens that follow"}, fast=True
    ),
    "t5-as-decoder": decoder(
        "T5",
        "ForConditionalGeneration",
        sizes=T5,
        refused={"load": "'t5', of which transformers has no decoder"},
    ),
    "bart-as-decoder": decoder(
        "Bart", "ForConditionalGeneration", sizes=BART, refused={"load": "instructions need a decoder"}
    ),
    "nystromformer": encoder(
        "Nystromformer", sizes={"num_landmarks": 16, "segment_means_seq_len": 16}, fed=PADDING
    ),
    "nystromformer-landmarks": encoder(
        "Nystromformer",
        sizes={"num_landmarks": 4, "segment_means_seq_len": 16},
        refused={"load": "a model for rows of one length only cannot be trained"},
    ),
    "vit": image("ViT"),
    "deit": image("DeiT"),
    "swin": image("Swin", embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2),
}
