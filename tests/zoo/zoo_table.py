"""Which architectures fedlora claims to train: one line each, with what it refuses of them, word for word.

To add an architecture, add a line to `ZOO`. `refused` maps a claim of `zoo_claims.CLAIMS` to a part of the
line that fedlora says instead; "load" and "targets" stand for the model as a whole.
"""

from zoo_entry import SIZES, Entry, decoder, encoder
from zoo_more import MORE
from zoo_odd import ODD
from zoo_sizes import (
    APART,
    APART_BY_CLIENT,
    BART,
    DEBERTA,
    EXPERTS,
    GPT,
    GROUPED,
    HEADS,
    LATENT,
    LOCAL_EXPERTS,
    MAMBA,
    SLIDING,
    T5,
)

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
    "opt": decoder("OPT", sizes={"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": decoder("Bloom", sizes={"n_layer": 2, "n_head": 4}, single=True),
    "falcon": decoder("Falcon", sizes={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo2": decoder("Olmo2", sizes=GROUPED),
    "gpt-oss": decoder(
        "GptOss",
        sizes={**HEADS, **SLIDING, **LOCAL_EXPERTS},
        single=True,
        left_out="model.layers.*.mlp.experts, model.layers.*.mlp.router (no linear layers)",
    ),
    "granite": decoder("Granite", sizes=GROUPED),
    "mixtral": decoder(
        "Mixtral",
        sizes={**GROUPED, **LOCAL_EXPERTS, "sliding_window": None},
        single=True,
        left_out="model.layers.*.mlp.experts, model.layers.*.mlp.gate (no linear layers)",
        fast=True,
    ),
    "qwen3-moe": decoder(
        "Qwen3Moe",
        sizes={**HEADS, **EXPERTS},
        single=True,
        left_out="model.layers.*.mlp.experts, model.layers.*.mlp.gate (no linear layers)",
    ),
    "bamba": decoder("Bamba", sizes={**GROUPED, **MAMBA, "attn_layer_indices": [1]}, single=True),
    "lfm2": decoder(
        "Lfm2",
        sizes={**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "bigbird": encoder(
        "BigBird",
        sizes={"attention_type": "original_full"},
        left_out="bert.pooler (no part in the loss)",
    ),
    "esm": encoder(
        "Esm",
        sizes={"mask_token_id": 4, "position_embedding_type": "rotary"},
        left_out="esm.contact_head (never called)",
    ),
    "deepseek-v3": decoder(
        "DeepseekV3",
        sizes=LATENT,
        single=True,
        refused=APART_BY_CLIENT,
        left_out=(
            "model.layers.*.mlp, model.layers.*.mlp.shared_experts (PEFT drops their factors "
            "when it loads the adapter); model.layers.*.mlp.experts, model.layers.*.mlp.gate "
            "(no linear layers)"
        ),
        fast=True,
    ),
    "qwen2-moe": decoder(
        "Qwen2Moe",
        sizes={**HEADS, **EXPERTS, "shared_expert_intermediate_size": 24},
        single=True,
        left_out="model.layers.*.mlp.experts, model.layers.*.mlp.gate (no linear layers)",
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
        left_out=(
            "model.layers.*.mlp.experts, model.layers.*.mlp.gate (no linear layers); "
            "model.layers.*.mlp.shared_expert (PEFT drops their factors when it loads the "
            "adapter)"
        ),
    ),
    "mamba": decoder(
        "Mamba",
        sizes={"state_size": 8},
        single=True,
        left_out=(
            "backbone.layers.*.mixer.dt_proj (never called); backbone.layers.*.mixer.out_proj "
            "(PEFT refuses it: Module 'out_proj' is incompatible with Mamba-based models "
            "(model_type='mamba'))"
        ),
    ),
    "mamba2": decoder(
        "Mamba2",
        sizes={"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        single=True,
        left_out=(
            "backbone.layers.*.mixer.out_proj (PEFT refuses it: Module 'out_proj' is "
            "incompatible with Mamba-based models (model_type='mamba2'))"
        ),
        fast=True,
    ),
    "falcon-mamba": decoder(
        "FalconMamba",
        sizes={"state_size": 8},
        single=True,
        left_out=(
            "backbone.layers.*.mixer.dt_proj (never called); backbone.layers.*.mixer.out_proj "
            "(PEFT refuses it: Module 'out_proj' is incompatible with Mamba-based models "
            "(model_type='falcon_mamba'))"
        ),
    ),
    "falcon-h1": decoder(
        "FalconH1",
        sizes={**HEADS, **MAMBA, "mamba_d_ssm": 64},
        single=True,
        left_out=(
            "model.layers.*.mamba.out_proj (PEFT refuses it: Module 'out_proj' is "
            "incompatible with Mamba-based models (model_type='falcon_h1'))"
        ),
    ),
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
        left_out=(
            "model.layers.*.mamba.dt_proj (never called); "
            "model.layers.*.feed_forward.experts, model.layers.*.feed_forward.router (no "
            "linear layers)"
        ),
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
        left_out=(
            "model.layers.*.feed_forward.experts (no linear layers); "
            "model.layers.*.feed_forward.router (a tuple as output)"
        ),
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
        left_out="model.vision_tower (never called)",
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
        single=True,
        left_out="model.embed_vision, model.vision_tower (never called)",
    ),
    "bert-decoder": decoder("Bert", "LMHeadModel", sizes={"is_decoder": True}, refused=APART_BY_CLIENT),
    **MORE,
    **ODD,
}
