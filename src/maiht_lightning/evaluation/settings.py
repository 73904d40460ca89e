"""What to evaluate, and doing it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.calibration import check_at_least
from ..data.sources import evaluation_windows
from .perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Papers cut WikiText-2 into windows of LLaMA's 2,048 tokens; longer contexts are rarely what is compared.
LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Evaluation:
    """What a model is measured by.

    Args:
        perplexity: Texts to measure perplexity on: `wikitext2`, `c4`, `python_docs`, or paths of .txt files.
            Empty to measure none.
        seqlen: Tokens a window; by default the model's context, at most 2,048.
        max_windows: Only the first windows of each text, for a quick look.
        batch_size: Windows a forward pass; the result does not depend on it.
    """

    perplexity: list[str] = field(default_factory=lambda: ["wikitext2"])
    seqlen: int | None = None
    max_windows: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size)
        if self.seqlen is not None:
            check_at_least(2, seqlen=self.seqlen)
        if self.max_windows is not None:
            check_at_least(1, max_windows=self.max_windows)

    def windows(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Tensor]:
        """Token windows (windows, seqlen) of each text; errors of missing texts come here."""
        seqlen = self.seqlen or context_length(model)
        return {name: evaluation_windows(name, tokenizer, seqlen, self.max_windows) for name in self.perplexity}


def context_length(model: nn.Module) -> int:
    """The model's context in tokens, at most 2,048."""
    return min(getattr(getattr(model, "config", None), "max_position_embeddings", LONGEST_WINDOW), LONGEST_WINDOW)


@torch.no_grad()
def measure_perplexities(
    model: nn.Module,
    windows: dict[str, Tensor],
    *,
    batch_size: int = 1,
    stage: str = "",
    progress: bool = True,
) -> dict[str, float]:
    """Perplexity by text.

    Args:
        model: A Hugging Face causal language model.
        windows: Token ids (windows, seqlen) by the text's name.
        batch_size: Windows a forward pass.
        stage: Name of the model's state, for the progress bar.
        progress: Show progress bars.
    """
    return {
        name: perplexity(
            model,
            tokens,
            batch_size=batch_size,
            progress=progress,
            description=f"Perplexity {name} {stage}".strip(),
        )
        for name, tokens in windows.items()
    }
