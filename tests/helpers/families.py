"""Small models of the supported families, with random weights."""

import torch
import transformers

VOCABULARY = 64


LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]


# Family: class prefix and settings, path of the blocks.
FAMILIES = {
    "llama": ("Llama", LLAMA_LIKE, "model.layers"),
    "mistral": ("Mistral", {**LLAMA_LIKE, "sliding_window": 4}, "model.layers"),
    "qwen2": ("Qwen2", {**LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 4, "layer_types": HYBRID}, 0),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, "head_dim": 8}, 0),
    "gemma3": ("Gemma3", {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "layer_types": HYBRID}, 0),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
        },
        "model.decoder.layers",
    ),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, "transformer.h"),
    "falcon": (
        "Falcon",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
        "transformer.h",
    ),
    "falcon_alibi": (
        "Falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "alibi": True,
            "parallel_attn": False,
        },
        "transformer.h",
    ),
}


def make(family):
    """A small model with seeded random weights, in eval mode."""
    prefix, settings, _ = FAMILIES[family]
    config_class = getattr(transformers, f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config")
    model_class = getattr(transformers, f"{prefix}{'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'}")
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**settings, **tokens)).eval()
        for parameter in model.parameters():  # biases and norms too, and larger than at the start
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
