"""From texts to whole windows of tokens, and the windows on which papers measure perplexity."""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..validation import check_at_least
from .sources import iterate_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In English, roughly. A wrong guess costs a second tokenization and nothing else.
_CHARACTERS_PER_TOKEN = 4

# C4's perplexity in papers: the first 1,100 documents of the validation shard, at most 256 windows
# (https://github.com/IST-DASLab/sparsegpt, https://github.com/locuslab/wanda).
_C4_EVALUATION_DOCUMENTS = 1100
_C4_EVALUATION_WINDOWS = 256


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Turn a whole text into token ids, with the special tokens that the tokenizer adds by itself."""
    # `verbose=False` keeps back the tokenizer's remark that the text exceeds the model's length: it is cut later.
    return tokenizer(text, verbose=False)["input_ids"]


def document_separator(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Choose what stands between two unrelated documents: the eos token, else the bos token, else a blank line."""
    return tokenizer.eos_token or tokenizer.bos_token or "\n\n"


def cut_windows(ids: list[int], seqlen: int, samples: int | None = None) -> Tensor:
    """Cut a stream of tokens into windows side by side, and drop the tail that fills no window.

    Args:
        ids: The token stream.
        seqlen: Tokens per window.
        samples: Windows wanted: the first ones are taken. None takes all there are, but at least one.

    Returns:
        (windows, seqlen), int64.

    Raises:
        ValueError: The stream is shorter than the windows asked for.
    """
    found = len(ids) // seqlen
    wanted = 1 if samples is None else samples
    if found < wanted:
        raise ValueError(
            f"the text must fill {wanted} window(s) of seqlen={seqlen} tokens ({wanted * seqlen} tokens), but found "
            f"{len(ids)} tokens, which make {found}: ask for fewer samples or a smaller seqlen, or give more text"
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
    r"""Join texts, tokenize the result once, and cut it into whole windows.

    With `separator="\n\n"` and WikiText-2's rows, these are the windows of the perplexity that papers quote
    (GPTQ, https://arxiv.org/abs/2210.17323, and those that follow it).

    Args:
        texts: Documents or lines, in order. With `samples` given, they are read only as far as needed.
        tokenizer: A Hugging Face tokenizer.
        seqlen: Tokens per window.
        samples: Windows wanted, None for all of them.
        separator: What to put between two texts. None: see `document_separator`.

    Returns:
        (windows, seqlen), int64.

    Raises:
        ValueError: The texts do not fill `samples` windows (one, if `samples` is None).
    """
    if separator is None:
        separator = document_separator(tokenizer)
    if samples is None:
        return cut_windows(tokenize(separator.join(texts), tokenizer), seqlen)

    wanted = samples * seqlen
    read: list[str] = []
    # The tokens of all of `read`, where these are known. Texts are tokenized together, since two texts apart may make
    # other tokens than both joined; so it is done only where the characters promise enough of them.
    ids: list[int] | None = None
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


def evaluation_windows(
    name: str, tokenizer: "PreTrainedTokenizerBase", seqlen: int, max_windows: int | None = None
) -> Tensor:
    r"""Cut a held-out text into windows as papers do for perplexity.

    WikiText-2: the test split's lines joined by `"\n\n"`. C4: the first 1,100 documents of the validation shard joined
    by a space, at most 256 windows. `python_docs`: the topics held out. Text file: all of it.

    Args:
        name: As for `load_texts`.
        tokenizer: A Hugging Face tokenizer.
        seqlen: Tokens per window; figures are comparable only at the same length (2048 for LLaMA).
        max_windows: Take only the first so many; None, as papers do, takes all.

    Returns:
        (windows, seqlen), int64.

    Raises:
        ValueError: The name is unknown, `max_windows` is below 1, or the text does not fill a window.
        FileNotFoundError: As for `load_texts`.
    """
    if max_windows is not None:
        check_at_least(1, max_windows=max_windows)
    is_c4 = name == "c4"
    texts = iterate_texts(name, "validation" if is_c4 else "test")
    try:
        if is_c4:
            documents = islice(texts, _C4_EVALUATION_DOCUMENTS)
            windows = pack_windows(documents, tokenizer, seqlen, separator=" ")[:_C4_EVALUATION_WINDOWS]
        else:
            windows = pack_windows(texts, tokenizer, seqlen, separator="\n\n")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return windows[:max_windows]
