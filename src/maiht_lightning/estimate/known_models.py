"""Configs of well-known models, so that a run can be predicted where the hub cannot be reached."""

from typing import Any

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)

# By hub name: model type, and the fields above, as in the models' own config.json.
_KNOWN: dict[str, tuple[str, tuple[int, int, int, int, int, int, bool]]] = {
    "huggyllama/llama-7b": ("llama", (4096, 11008, 32, 32, 32, 32000, False)),
    "huggyllama/llama-13b": ("llama", (5120, 13824, 40, 40, 40, 32000, False)),
    "huggyllama/llama-30b": ("llama", (6656, 17920, 60, 52, 52, 32000, False)),
    "huggyllama/llama-65b": ("llama", (8192, 22016, 80, 64, 64, 32000, False)),
    "meta-llama/Llama-2-7b-hf": ("llama", (4096, 11008, 32, 32, 32, 32000, False)),
    "meta-llama/Llama-2-13b-hf": ("llama", (5120, 13824, 40, 40, 40, 32000, False)),
    "meta-llama/Llama-2-70b-hf": ("llama", (8192, 28672, 80, 64, 8, 32000, False)),
    "meta-llama/Meta-Llama-3-8B": ("llama", (4096, 14336, 32, 32, 8, 128256, False)),
    "meta-llama/Meta-Llama-3-70B": ("llama", (8192, 28672, 80, 64, 8, 128256, False)),
    "meta-llama/Llama-3.1-8B": ("llama", (4096, 14336, 32, 32, 8, 128256, False)),
    "meta-llama/Llama-3.1-70B": ("llama", (8192, 28672, 80, 64, 8, 128256, False)),
    "meta-llama/Llama-3.2-1B": ("llama", (2048, 8192, 16, 32, 8, 128256, True)),
    "meta-llama/Llama-3.2-3B": ("llama", (3072, 8192, 28, 24, 8, 128256, True)),
    "mistralai/Mistral-7B-v0.1": ("mistral", (4096, 14336, 32, 32, 8, 32000, False)),
    "mistralai/Mistral-7B-v0.3": ("mistral", (4096, 14336, 32, 32, 8, 32768, False)),
    "Qwen/Qwen2.5-0.5B": ("qwen2", (896, 4864, 24, 14, 2, 151936, True)),
    "Qwen/Qwen2.5-1.5B": ("qwen2", (1536, 8960, 28, 12, 2, 151936, True)),
    "Qwen/Qwen2.5-3B": ("qwen2", (2048, 11008, 36, 16, 2, 151936, True)),
    "Qwen/Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 28, 4, 152064, False)),
    "Qwen/Qwen2.5-14B": ("qwen2", (5120, 13824, 48, 40, 8, 152064, False)),
    "Qwen/Qwen2.5-32B": ("qwen2", (5120, 27648, 64, 40, 8, 152064, False)),
    "Qwen/Qwen2.5-72B": ("qwen2", (8192, 29568, 80, 64, 8, 152064, False)),
    "HuggingFaceTB/SmolLM2-135M": ("llama", (576, 1536, 30, 9, 3, 49152, True)),
    "HuggingFaceTB/SmolLM2-360M": ("llama", (960, 2560, 32, 15, 5, 49152, True)),
    "HuggingFaceTB/SmolLM2-1.7B": ("llama", (2048, 8192, 24, 32, 32, 49152, True)),
}

KNOWN_MODELS = tuple(_KNOWN)


def known_config(name: str) -> Any | None:
    """Make the config of a well-known model by its hub name, whatever its case; None for others.

    Only sizes are those of the model. A window is as long as it is asked for, so that there is no longest one.
    """
    from transformers import AutoConfig

    found = {known.lower(): value for known, value in _KNOWN.items()}.get(name.lower())
    if found is None:
        return None
    kind, sizes = found
    return AutoConfig.for_model(kind, **dict(zip(_FIELDS, sizes, strict=True)))
