"""From texts to whole windows of tokens."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 4  # English, roughly; a wrong guess costs a second tokenization, nothing else


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of the whole text, with the special tokens that the tokenizer adds by itself.

    ``verbose=False`` keeps back its remark that the text exceeds the model's length: it is cut later.
    """
    return tokenizer(text, verbose=False)["input_ids"]


def document_separator(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What stands between two unrelated documents: the eos token, else the bos token, else a blank line."""
    return tokenizer.eos_token or tokenizer.bos_token or "\n\n"


def cut_windows(ids: list[int], seqlen: int, samples: int | None = None) -> Tensor:
    """Cuts a stream of tokens into windows side by side; the tail that fills no window is dropped.

    Args:
        ids: The token stream.
        seqlen: Tokens in a window.
        samples: Windows wanted: the first ones are taken. None takes all there are, but at least one.

    Returns:
        ``(windows, seqlen)``, int64.

    Raises:
        ValueError: The stream is shorter than the windows asked for.
    """
    found = len(ids) // seqlen
    wanted = 1 if samples is None else samples
    if found < wanted:
        raise ValueError(
            f"the text is too short: expected {wanted} window(s) of seqlen={seqlen} tokens "
            f"({wanted * seqlen} tokens), found {len(ids)} tokens, which make {found}; "
            "ask for fewer samples, a smaller seqlen, or give more text"
        )
    count = found if samples is None else samples
    return torch.tensor(ids[: count * seqlen]).view(count, seqlen)


def pack_windows(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    seqlen: int,
    *,
    samples: int | None = None,
    separator: str | None = None,
) -> Tensor:
    r"""Joins texts, tokenizes the result once, and cuts it into whole windows.

    With ``separator="\n\n"`` and WikiText-2's rows, these are the windows of the perplexity that papers quote
    (GPTQ, https://arxiv.org/abs/2210.17323, and those that follow it).

    Args:
        texts: Documents or lines, in order. With ``samples`` given, they are read only as far as needed.
        tokenizer: A Hugging Face tokenizer.
        seqlen: Tokens in a window.
        samples: Windows wanted, None for all of them.
        separator: What to put between two texts. None: the tokenizer's eos token, else its bos token, else
            a blank line.

    Returns:
        ``(windows, seqlen)``, int64.

    Raises:
        ValueError: The texts do not fill ``samples`` windows (one, if ``samples`` is None).
    """
    if separator is None:
        separator = document_separator(tokenizer)
    if samples is None:
        return cut_windows(tokenize(separator.join(texts), tokenizer), seqlen)

    wanted = samples * seqlen
    read: list[str] = []
    ids: list[int] | None = None  # tokens of all that was read, where these are known
    characters, enough = 0, wanted * _CHARACTERS_PER_TOKEN
    for text in texts:
        read.append(text)
        characters += len(text)
        ids = None
        if characters >= enough:
            ids = tokenize(separator.join(read), tokenizer)
            if len(ids) >= wanted:
                break
            enough = 2 * characters
    if ids is None:
        ids = tokenize(separator.join(read), tokenizer)
    return cut_windows(ids, seqlen, samples)
