"""English prose that every Python carries, for calibration and for fine-tuning without a network."""

import random
from typing import TYPE_CHECKING

from torch import Tensor

from ..validation import check_at_least
from .calibration import CalibrationSource
from .module import TextDataModule
from .sources import python_docs_texts
from .windows import pack_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PythonDocsCalibration(CalibrationSource):
    """Calibration windows from the Python reference's calibration topics, packed in random order.

    They are made for trying things out without a network: there are some 20 thousand tokens, 80 windows of 256. For
    figures to compare with papers, use `C4Calibration`.

    Args:
        samples: Number of windows.
        seqlen: Tokens per window. None: the length that the caller finds right for the model.
        seed: Of the order of the topics.

    Raises:
        ValueError: A setting is out of range.
    """

    reads_text = True

    def __init__(self, samples: int = 64, seqlen: int | None = 256, seed: int = 0) -> None:
        check_at_least(1, samples=samples)
        check_at_least(2, seqlen=2 if seqlen is None else seqlen)
        self.samples = samples
        self.seqlen = seqlen
        self.seed = seed

    def windows(self, tokenizer: "PreTrainedTokenizerBase", seqlen: int) -> Tensor:
        """Pack the topics into windows, the same at each call.

        Args:
            tokenizer: The model's tokenizer.
            seqlen: Tokens per window, unless the constructor was given a length.

        Returns:
            (samples, seqlen), int64.

        Raises:
            ValueError: The text does not fill the windows.
        """
        texts = python_docs_texts("calibration")
        random.Random(self.seed).shuffle(texts)
        return pack_windows(texts, tokenizer, self.seqlen or seqlen, samples=self.samples)


class PythonDocsDataModule(TextDataModule):
    """The Python reference for fine-tuning without a network: validation and test are the held-out topics.

    Arguments and batches are those of `TextDataModule`.

    Example::

        trainer.fit(CausalLMModule("path/to/model"), datamodule=PythonDocsDataModule(seqlen=256))
    """

    def texts(self, split: str) -> list[str]:
        """List the topics of a split."""
        return python_docs_texts(split)
