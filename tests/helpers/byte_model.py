"""Small models whose tokens are bytes, in Hugging Face folders that need no download."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

VOCABULARY = 257


def byte_tokenizer():
    """A byte a token, and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def llama_config(**changes):
    """A LLaMA of two blocks with a context of 128 tokens."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def save_folder(path, config=None, *, dtype=torch.float32, seed=0):
    """Save a model with random weights and the tokenizer.

    The weights are larger than usual, so that blocks, head and text decide the perplexity, and not the vocabulary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config or llama_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return Path(path)


def same_weights(one, two):
    """Whether two models have the same parameters, to the bit."""
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@dataclass
class Seen:
    """What LLaMAs were given and were.

    Args:
        shapes: (batch, tokens) of the token ids of each forward pass.
        dtypes: The model's format in each.
        blocks: (batch, tokens) that a block was given, and what `look()` found at that time.
    """

    shapes: list = field(default_factory=list)
    dtypes: list = field(default_factory=list)
    blocks: list = field(default_factory=list)


@contextlib.contextmanager
def watching(monkeypatch, look=lambda: None):
    """Watch every LLaMA at the boundary of transformers."""
    seen = Seen()
    whole, block = modeling_llama.LlamaModel.forward, modeling_llama.LlamaDecoderLayer.forward

    def watch_model(self, input_ids=None, *args, **kwargs):
        seen.shapes.append(tuple(input_ids.shape))
        seen.dtypes.append(self.dtype)
        return whole(self, input_ids, *args, **kwargs)

    def watch_block(self, hidden_states, *args, **kwargs):
        seen.blocks.append((tuple(hidden_states.shape[:2]), look()))
        return block(self, hidden_states, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaModel, "forward", watch_model)
        patch.setattr(modeling_llama.LlamaDecoderLayer, "forward", watch_block)
        yield seen
