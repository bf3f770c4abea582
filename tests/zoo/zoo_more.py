"""Further architectures, kin of those in the table of `zoo_table`; a part of it."""

from zoo_entry import SIZES, Entry, decoder, encoder
from zoo_sizes import APART, DEBERTA, GPT, GROUPED, HEADS, LOCAL_EXPERTS, MAMBA, SLIDING

CLASSIFIER = {"pad_token_id": 0, **GROUPED}

MORE: dict[str, Entry] = {
    "xlm-roberta": encoder("XLMRoberta", sizes={"pad_token_id": 1, "type_vocab_size": 1}),
    "camembert": encoder("Camembert", sizes={"pad_token_id": 1, "type_vocab_size": 1}),
    "deberta-v1": encoder("Deberta", sizes=DEBERTA, refused=APART),
    "layoutlm": encoder("LayoutLM"),
    "qwen2-cls": Entry("Qwen2", "Qwen2ForCausalLM", "classification", CLASSIFIER),
    "gemma3-cls": Entry(
        "Gemma3Text",
        "Gemma3ForCausalLM",
        "classification",
        {"pad_token_id": 0, **HEADS, **SLIDING, "query_pre_attn_scalar": 8},
    ),
    "mixtral-cls": Entry(
        "Mixtral",
        "MixtralForCausalLM",
        "classification",
        {**CLASSIFIER, **LOCAL_EXPERTS, "sliding_window": None},
        single=True,
        left_out="model.layers.*.mlp.experts, model.layers.*.mlp.gate (no linear layers)",
    ),
    "gemma": decoder("Gemma", sizes=HEADS),
    "phi": decoder("Phi", sizes=GROUPED),
    "gptneo": decoder(
        "GPTNeo",
        sizes={
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        drop=("num_hidden_layers", "num_attention_heads"),
        single=True,
    ),
    "gptj": decoder("GPTJ", sizes={**GPT, "rotary_dim": 4}, drop=tuple(SIZES), single=True),
    "gptbigcode": decoder("GPTBigCode", sizes=GPT, drop=tuple(SIZES)),
    "falcon-alibi": decoder("Falcon", sizes={"alibi": True}),
    "starcoder2": decoder("Starcoder2", sizes={**GROUPED, "sliding_window": 8}),
    "olmo3": decoder("Olmo3", sizes={**GROUPED, **SLIDING}),
    "smollm3": decoder("SmolLM3", sizes=GROUPED),
    "cohere": decoder("Cohere", sizes=GROUPED),
    "stablelm": decoder("StableLm", sizes=GROUPED),
    "mpt": decoder(
        "Mpt",
        sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        drop=tuple(SIZES),
        single=True,
    ),
    "openai-gpt": decoder("OpenAIGPT", "LMHeadModel", sizes=GPT, drop=tuple(SIZES)),
    "biogpt": decoder("BioGpt"),
    "glm4": decoder("Glm4", sizes=HEADS),
    "granitemoehybrid": decoder(
        "GraniteMoeHybrid",
        sizes={
            **GROUPED,
            **MAMBA,
            **LOCAL_EXPERTS,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
        single=True,
        left_out=(
            "model.layers.*.block_sparse_moe.experts, model.layers.*.block_sparse_moe.router "
            "(no linear layers)"
        ),
    ),
    "modernbert-decoder": decoder("ModernBertDecoder", sizes={"local_attention": 8, "num_hidden_layers": 3}),
    "opt-proj": decoder("OPT", sizes={"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "qwen3.5": decoder(
        "Qwen3_5Text",
        family="Qwen3_5",
        sizes={
            **HEADS,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        single=True,
    ),
    "xglm": decoder(
        "XGLM",
        sizes={"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        drop=("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        single=True,
    ),
    "qwen2-window": decoder(
        "Qwen2", sizes={**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "rwkv": decoder(
        "Rwkv",
        sizes={"attention_hidden_size": 32, "context_length": 64},
        single=True,
        fed=("more than 17 tokens", "one thread trains it"),
        refused={"targets": "modified by an inplace operation"},
    ),
    "gte": encoder("Gte"),
    "jina-v3": encoder("JinaEmbeddingsV3"),
    "nomic-bert": encoder("NomicBert"),
}
