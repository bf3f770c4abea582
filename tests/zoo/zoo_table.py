"""Which architectures fedlora claims to train: one line each, with what it refuses of them, word for word.

To add an architecture, add a line to `ZOO`. `refused` maps a claim of `zoo_claims.CLAIMS` to a part of the
line that fedlora says instead; "load" stands for the model as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        config: the name of its configuration class in transformers, without "Config".
        model: the name of the class whose checkpoint is saved.
        kind: what fedlora trains it for.
        sizes: arguments of the configuration, over those of `SIZES`.
        drop: names of `SIZES` that this configuration does not take.
        parts: further configurations inside the configuration, such as `text_config`.
        targets: `lora.targets`.
        left_out: the layers that `all-linear` says it leaves out; empty where it says nothing.
        single: whether the claims are checked in float32, for models that transformers cannot run in float64.
        refused: claim -> a part of what fedlora says instead.
        fast: whether it is tested by default.
        tokenizer: whether the checkpoint has one.
        special: how the tokenizer wraps a text; "$A" is the text.
    """

    config: str
    model: str
    kind: Literal["classification", "instruction"]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    drop: Sequence[str] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    targets: str | Sequence[str] = "all-linear"
    left_out: str = ""
    single: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    fast: bool = False
    tokenizer: bool = True
    special: str = "$A"


def encoder(config: str, model: str = "ForMaskedLM", **more: Any) -> Entry:
    """An encoder whose checkpoint has no classification head, which fedlora makes up."""
    sizes = {"pad_token_id": 0, **more.pop("sizes", {})}
    more.setdefault("special", "<cls> $A <end>")
    return Entry(config, config + model, "classification", sizes, **more)


def decoder(config: str, model: str = "ForCausalLM", family: str = "", **more: Any) -> Entry:
    """A causal language model that is trained on instructions."""
    ids = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2}
    sizes = {**ids, **more.pop("sizes", {})}
    return Entry(config, (family or config) + model, "instruction", sizes, **more)


GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
APART = {"fused": "cannot be told apart by client", "private": "cannot be told apart by record"}

ZOO: dict[str, Entry] = {
    "bert": encoder("Bert", fast=True),
    "roberta": encoder("Roberta", sizes={"pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": encoder(
        "DistilBert", sizes={"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, drop=tuple(SIZES)
    ),
    "albert": encoder("Albert", sizes={"embedding_size": 16}),
    "electra": encoder("Electra", "ForPreTraining", sizes={"embedding_size": 16}),
    "deberta-v2": encoder("DebertaV2", sizes=DEBERTA, refused=APART, fast=True),
    "modernbert": encoder(
        "ModernBert", sizes={"num_hidden_layers": 3, "local_attention": 8, "global_attn_every_n_layers": 3}
    ),
    "mpnet": encoder("MPNet", sizes={"pad_token_id": 1}),
    "squeezebert": encoder("SqueezeBert", sizes={"embedding_size": 32}),
    "eurobert": encoder("EuroBert", sizes=GROUPED),
    "roformer": encoder("RoFormer", sizes={"embedding_size": 16}),
    "rembert": encoder("RemBert", sizes={"input_embedding_size": 16, "output_embedding_size": 32}),
    "ernie": encoder("Ernie"),
    "t5-cls": encoder("T5", "ForConditionalGeneration", sizes=T5, special="$A <end>"),
    "bart-cls": encoder("Bart", "ForConditionalGeneration", sizes={**BART, "pad_token_id": 1}),
    "llama-cls": Entry("Llama", "LlamaForCausalLM", "classification", {"pad_token_id": 0, **GROUPED}),
    "gpt2-cls": Entry("GPT2", "GPT2LMHeadModel", "classification", GPT, drop=tuple(SIZES)),
    "llama": decoder("Llama", sizes={**GROUPED, "tie_word_embeddings": True}, fast=True),
    "mistral": decoder("Mistral", sizes={**GROUPED, "sliding_window": 8}),
    "qwen2": decoder("Qwen2", sizes=GROUPED),
    "qwen3": decoder("Qwen3", sizes=HEADS),
    "gemma2": decoder(
        "Gemma2", sizes={**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8}, single=True
    ),
    "gemma3": decoder("Gemma3Text", family="Gemma3", sizes={**HEADS, **SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": decoder("Phi3", sizes={**GROUPED, "sliding_window": None}),
    "gpt2": decoder("GPT2", "LMHeadModel", sizes=GPT, drop=tuple(SIZES), fast=True),
    "gptneox": decoder("GPTNeoX"),
    "opt": decoder("OPT", sizes={"ffn_dim": 48, "word_embed_proj_dim": 32}, refused=APART),
    "bloom": decoder("Bloom", sizes={"n_layer": 2, "n_head": 4}),
    "falcon": decoder("Falcon", sizes={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo2": decoder("Olmo2", sizes=GROUPED),
    "gpt-oss": decoder("GptOss", sizes={**HEADS, **SLIDING, **LOCAL_EXPERTS}, single=True),
    "granite": decoder("Granite", sizes=GROUPED),
    "mixtral": decoder(
        "Mixtral", sizes={**GROUPED, **LOCAL_EXPERTS, "sliding_window": None}, single=True, fast=True
    ),
    "qwen3-moe": decoder("Qwen3Moe", sizes={**HEADS, **EXPERTS}, single=True),
    "bamba": decoder("Bamba", sizes={**GROUPED, **MAMBA, "attn_layer_indices": [1]}, single=True),
    "lfm2": decoder(
        "Lfm2",
        sizes={**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "bigbird": encoder(
        "BigBird",
        sizes={"attention_type": "original_full"},
        left_out="bert.pooler (has no part in the loss)",
    ),
    "esm": encoder("Esm", sizes={"mask_token_id": 4, "position_embedding_type": "rotary"}, left_out="?"),
    "deepseek-v3": decoder("DeepseekV3", sizes=LATENT, single=True, left_out="?", fast=True),
    "qwen2-moe": decoder(
        "Qwen2Moe",
        sizes={**HEADS, **EXPERTS, "shared_expert_intermediate_size": 24},
        single=True,
        left_out="?",
    ),
    "qwen3-next": decoder(
        "Qwen3Next",
        sizes={
            **HEADS,
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        single=True,
        left_out="?",
    ),
    "mamba": decoder("Mamba", sizes={"state_size": 8}, left_out="?"),
    "mamba2": decoder(
        "Mamba2",
        sizes={"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        single=True,
        left_out="?",
        fast=True,
    ),
    "falcon-mamba": decoder("FalconMamba", sizes={"state_size": 8}, left_out="?"),
    "falcon-h1": decoder("FalconH1", sizes={**HEADS, **MAMBA, "mamba_d_ssm": 64}, single=True, left_out="?"),
    "jamba": decoder(
        "Jamba",
        sizes={
            **GROUPED,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
        },
        single=True,
        left_out="?",
    ),
    "llama4": decoder(
        "Llama4",
        "ForConditionalGeneration",
        parts={
            "text_config": {
                **HEADS,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 48,
                "attention_chunk_size": 8,
            },
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 16,
                "patch_size": 4,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "vision_output_dim": 16,
            },
        },
        single=True,
        left_out="?",
    ),
    "gemma3-mm": decoder(
        "Gemma3",
        "ForConditionalGeneration",
        sizes={
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        parts={
            "text_config": {**HEADS, **SLIDING, "query_pre_attn_scalar": 8},
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 16,
                "patch_size": 8,
            },
        },
        left_out="?",
    ),
    "gemma4-mm": decoder(
        "Gemma4",
        "ForConditionalGeneration",
        parts={
            "text_config": {
                **HEADS,
                **SLIDING,
                "global_head_dim": 8,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 96,
                "num_kv_shared_layers": 0,
            },
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "patch_size": 4,
                "head_dim": 8,
            },
        },
        left_out="?",
    ),
    "bert-decoder": decoder(
        "Bert", "LMHeadModel", sizes={"is_decoder": True}, refused={"fused": APART["fused"]}
    ),
}
