"""`CalibrationSource`: what the pruner asks of a source of calibration text."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CalibrationSource(ABC):
    """Where calibration windows come from.

    A subclass can be given to the pruning callback, and on the command line by its class's path.

    Example::

        class MyText(CalibrationSource):
            def windows(self, tokenizer, seqlen):
                return pack_windows(my_documents(), tokenizer, seqlen, samples=128)

    Attributes:
        reads_text: Whether it is of no use without a tokenizer, so that a missing one is told before a text is read.
    """

    reads_text = False

    @abstractmethod
    def windows(self, tokenizer: "PreTrainedTokenizerBase", seqlen: int) -> Tensor:
        """Draw the windows.

        Args:
            tokenizer: The model's tokenizer.
            seqlen: The length in tokens that suits the model; a source with a length of its own may prefer that.

        Returns:
            (samples, seqlen), int64, the same at each call. Each window is whole: padding would count as text.
        """
