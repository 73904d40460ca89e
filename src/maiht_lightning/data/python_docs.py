"""English prose that every Python carries: the language reference behind ``help()``. Needs no network."""

import random
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from ..validation import check_at_least
from .calibration import CalibrationSource
from .module import TextDataModule
from .windows import pack_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Whole topics by name, so that the splits stay nearly the same from one Python to the next; all others are
# for training. Each split has long and short topics, prose and grammar.
_TOPICS = {
    "heldout": ("calls", "execmodel", "objects", "strings", "types"),
    "calibration": ("comparisons", "debugger", "formatstrings", "import", "typesseq"),
}
_ALIASES = {"validation": "heldout", "test": "heldout"}

# Shorter paragraphs ("For example:") may stand in several topics without giving anything away.
_SHORT = 80  # characters


def python_docs_texts(split: str) -> list[str]:
    """The topics of one split of ``pydoc_data.topics``: about 90 thousand tokens of technical English in all.

    No topic is in two splits. Topics quote each other at length, so no paragraph is in two splits or twice in
    one either, apart from the very short; a topic that loses half its text this way is left out.

    Args:
        split: ``train`` (the largest), ``calibration``, ``heldout``; ``validation`` and ``test`` are the
            held-out text too.

    Raises:
        ValueError: No such split.
    """
    splits = _splits()
    name = _ALIASES.get(split, split)
    if name not in splits:
        raise ValueError(f"python_docs has no split {split!r}: expected one of {', '.join([*splits, *_ALIASES])}")
    return list(splits[name])


@cache
def _splits() -> dict[str, tuple[str, ...]]:
    from pydoc_data.topics import topics

    chosen = {name for names in _TOPICS.values() for name in names}
    members = {
        **{split: [name for name in names if name in topics] for split, names in _TOPICS.items()},
        "train": [name for name in topics if name not in chosen],
    }
    seen: set[str] = set()
    # Held-out text claims its paragraphs first, then calibration; the longest topics go first, as it is
    # these that quote the short ones.
    splits = {}
    for split, names in members.items():
        ordered = sorted(names, key=lambda name: (-len(topics[name]), name))
        rests = ((name, _unseen_paragraphs(topics[name], seen)) for name in ordered)
        splits[split] = tuple(rest for name, rest in rests if 2 * len(rest) >= len(topics[name]))
    return splits


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """The text without the paragraphs in ``seen``, to which its own are added; layout does not count."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) >= _SHORT:
            if words in seen:
                continue
            seen.add(words)
        kept.append(paragraph)
    return "\n\n".join(kept)


class PythonDocsCalibration(CalibrationSource):
    """Calibration windows from the Python reference's calibration topics, packed in random order.

    Made for trying things out without a network: there are some 20 thousand tokens, 80 windows of 256.
    For figures to compare with papers, use :class:`C4Calibration`.

    Args:
        samples: Number of windows.
        seqlen: Tokens in a window. None: the length the caller finds right for the model.
        seed: Of the order of the topics.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, samples: int = 64, seqlen: int | None = 256, seed: int = 0) -> None:
        check_at_least(1, samples=samples)
        check_at_least(2, seqlen=2 if seqlen is None else seqlen)
        self.samples = samples
        self.seqlen = seqlen
        self.seed = seed

    def windows(self, tokenizer: "PreTrainedTokenizerBase", seqlen: int) -> Tensor:
        """The windows, the same at each call.

        Args:
            tokenizer: The model's tokenizer.
            seqlen: Tokens in a window, unless the constructor was given a length.

        Returns:
            ``(samples, seqlen)``, int64.

        Raises:
            ValueError: The text does not fill the windows.
        """
        texts = python_docs_texts("calibration")
        random.Random(self.seed).shuffle(texts)
        return pack_windows(texts, tokenizer, self.seqlen or seqlen, samples=self.samples)


class PythonDocsDataModule(TextDataModule):
    """The Python reference for fine-tuning without a network: validation and test are the held-out topics.

    Arguments and batches are those of :class:`TextDataModule`.

    Example::

        trainer.fit(CausalLMModule("path/to/model"), datamodule=PythonDocsDataModule(seqlen=256))
    """

    def texts(self, split: str) -> list[str]:
        """The topics of a split."""
        return python_docs_texts(split)
