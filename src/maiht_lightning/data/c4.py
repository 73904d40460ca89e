"""Calibration windows from C4, as one-shot pruning papers draw them."""

import random
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor

from ..validation import check_at_least
from .calibration import CalibrationSource
from .sources import iterate_texts
from .windows import pack_windows, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Sampling = Literal["wanda", "packed"]

# Documents that are held at once to shuffle the shard while it streams. One in thirty is longer than 2,048 tokens, so
# that 128 windows are found in the first few thousand.
_BUFFER = 10_000


class C4Calibration(CalibrationSource):
    """Calibration windows from the first shard of C4's English training text.

    The shard is streamed from the hub (`allenai/c4`) as far as needed, or read from `c4/train.jsonl.gz` in the folder
    that `MAIHT_DATA_DIR` names. The same seed gives the same windows.

    Args:
        samples: Number of windows; 128 in papers.
        seqlen: Tokens per window. None: the length that the caller finds right for the model.
        sampling: `wanda`: a random crop out of each of `samples` random documents longer than the window (SparseGPT,
            https://arxiv.org/abs/2301.00774, and Wanda, https://arxiv.org/abs/2306.11695). Where too few are that
            long, they are cropped again at other places. `packed`: random documents end to end, with the eos token
            between, cut into windows: short documents take part too.
        seed: Of the order of the documents and of the crops.

    Raises:
        ValueError: A setting is out of range.
    """

    reads_text = True

    def __init__(
        self, samples: int = 128, seqlen: int | None = None, sampling: Sampling = "wanda", seed: int = 0
    ) -> None:
        check_at_least(1, samples=samples)
        check_at_least(2, seqlen=2 if seqlen is None else seqlen)
        if sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be one of {', '.join(get_args(Sampling))}, but found {sampling!r}")
        self.samples = samples
        self.seqlen = seqlen
        self.sampling = sampling
        self.seed = seed

    def windows(self, tokenizer: "PreTrainedTokenizerBase", seqlen: int) -> Tensor:
        """Draw the windows, the same at each call.

        Args:
            tokenizer: The model's tokenizer.
            seqlen: Tokens per window, unless the constructor was given a length.

        Returns:
            (samples, seqlen), int64.

        Raises:
            ValueError: No document is longer than a window (`wanda`), or all of them together do not fill the windows
                (`packed`).
            FileNotFoundError: `MAIHT_DATA_DIR` is set but lacks the file.
        """
        seqlen = self.seqlen or seqlen
        rng = random.Random(self.seed)
        documents = shuffled(iterate_texts("c4", "train"), rng, _BUFFER)
        if self.sampling == "packed":
            return pack_windows(documents, tokenizer, seqlen, samples=self.samples)
        return crop_windows(documents, tokenizer, seqlen, samples=self.samples, rng=rng)


def shuffled(items: Iterable[T], rng: random.Random, buffer_size: int) -> Iterator[T]:
    """Bring a stream into random order, holding at most `buffer_size` items; uniform where all of them fit."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        index = rng.randrange(buffer_size)
        yield buffer[index]
        buffer[index] = item
    rng.shuffle(buffer)
    yield from buffer


def crop_windows(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    seqlen: int,
    *,
    samples: int,
    rng: random.Random,
) -> Tensor:
    """Cut one random crop out of each of the first `samples` documents longer than a window.

    Every document is looked at once at most, so that the search ends. Where it ends with too few long documents, these
    are cropped again in turn, at other random places, with a warning.

    Args:
        documents: Texts in random order, read only as far as needed.
        tokenizer: A Hugging Face tokenizer.
        seqlen: Tokens per window.
        samples: Windows wanted.
        rng: Source of the crops' places.

    Returns:
        (samples, seqlen), int64.

    Raises:
        ValueError: No document is longer than a window.
    """
    long: list[list[int]] = []
    looked_at = 0
    for text in documents:
        looked_at += 1
        # A token covers a byte of text or more, apart from the few special ones that a tokenizer adds, for which there
        # are 8. A text of fewer bytes cannot be longer than a window, and tokenizing it would be in vain.
        if len(text.encode()) + 8 < seqlen:
            continue
        ids = tokenize(text, tokenizer)
        if len(ids) > seqlen:
            long.append(ids)
            if len(long) == samples:
                break
    if not long:
        raise ValueError(
            f"some documents must be longer than seqlen={seqlen} tokens for sampling: wanda, but found 0 among "
            f"{looked_at} documents: use sampling: packed, or a smaller seqlen"
        )
    if len(long) < samples:
        warnings.warn(
            f"only {len(long)} of {looked_at} documents are longer than {seqlen} tokens: the {samples} "
            "windows are cropped from these, some more than once; sampling: packed would use all documents",
            stacklevel=2,
        )
    crops = []
    for sample in range(samples):
        ids = long[sample % len(long)]
        start = rng.randrange(len(ids) - seqlen + 1)
        crops.append(ids[start : start + seqlen])
    return torch.tensor(crops)
