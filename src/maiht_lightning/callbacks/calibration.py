"""Where a pruning's calibration windows come from: a text, tokens of the user's own, or the batches of the fit."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..data.batches import CALIBRATION_TOKENS, TokenBatches, Windows
from ..data.calibration import CalibrationSource

Calibration = CalibrationSource | Literal["train"] | TokenBatches


def check_calibration(calibration: Calibration) -> None:
    """Raise `TypeError` unless calibration windows can come from there."""
    if _is_source(calibration) or (isinstance(calibration, str) and calibration == "train"):
        return
    is_named = isinstance(calibration, str) or (isinstance(calibration, Mapping) and "input_ids" not in calibration)
    if is_named or not isinstance(calibration, Tensor | TokenBatches):
        raise TypeError(
            "calibration must be a LongTensor of token ids (samples, seqlen), a DataLoader or other batches with "
            f"input_ids, 'train', or have a method windows(tokenizer, seqlen), but found {calibration!r}"
        )


def draw_windows(calibration: Calibration, tokenizer: Any, seqlen: int) -> Windows | None:
    """Draw the windows; None where they are still to come, in the training.

    Args:
        calibration: Where they come from.
        tokenizer: The model's tokenizer, or a `MissingTokenizer`.
        seqlen: The length in tokens that suits the model, for a source of text.

    Raises:
        ValueError, TypeError, OSError: As the source, or as `Windows.parse`.
    """
    if isinstance(calibration, str):
        return None
    given: Any = calibration
    if getattr(given, "reads_text", False) and isinstance(tokenizer, MissingTokenizer):
        tokenizer()
    return Windows.parse(given.windows(tokenizer, seqlen) if _is_source(given) else given, tokens=CALIBRATION_TOKENS)


def describe(calibration: Calibration, windows: Windows | None) -> dict[str, Any]:
    """Say where the windows come from, for the report and the loggers."""
    settings = vars(calibration) if _is_source(calibration) else {}
    described = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    name = calibration if isinstance(calibration, str) else type(calibration).__name__
    return {"class": name, **described, **describe_windows(windows)}


def describe_windows(windows: Windows | None) -> dict[str, Any]:
    """Say how many windows of which length there are; of several lengths, the longest and the tokens in all."""
    if windows is None:
        return {"windows": []}
    shape = {"windows": [windows.samples, windows.groups[0].shape[1]]}
    return shape if len(windows.groups) == 1 else {**shape, "tokens": windows.tokens}


class MissingTokenizer:
    """Stands where a tokenizer is missing, and says so to whoever uses it.

    Args:
        reason: Why there is none.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise `ValueError`."""
        raise ValueError(f"no tokenizer for the calibration text: {self.reason}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self()


# Transformers 5.24 has renamed the argument.
CACHE_NAMES = ("past_key_values", "cache")


class TrainingWindows:
    """The windows that a model is trained on first, with as many tokens as calibration takes.

    They are what the LightningModule gives the model, whatever its batches are. They go into the fit's checkpoints, so
    that a fit that resumes prunes with the same.

    Attributes:
        is_listening: Whether a forward pass is one of the training.
    """

    def __init__(self) -> None:
        self.is_listening = False
        self._found: list[Windows] = []
        self._handle: RemovableHandle | None = None

    @property
    def is_full(self) -> bool:
        """Whether there are enough."""
        return sum(windows.tokens for windows in self._found) >= CALIBRATION_TOKENS

    def require(self) -> None:
        """Raise `MisconfigurationException` if the model was given no token ids so far."""
        if not self._found:
            raise MisconfigurationException(
                "calibration='train' takes what the model is trained on, but this fit gave it no input_ids: give "
                "calibration a DataLoader or a LongTensor"
            )

    def windows(self) -> Windows:
        """All windows so far; raises as `require`."""
        self.require()
        rows = [row for windows in self._found for group in windows.groups for row in group]
        return Windows.of(rows, is_masked=all(windows.is_masked for windows in self._found))

    def watch(self, model: nn.Module, check: Callable[[Windows], None]) -> None:
        """Take the token ids of the model's forward passes, until there are enough.

        Args:
            model: The Hugging Face causal language model.
            check: Raises what is wrong with windows, which is raised by the training step that has them.
        """
        self.close()
        if self.is_full:
            return

        def see(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature(backbone.forward).bind_partial(*args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
            # What is generated has a cache, and embeddings are no tokens.
            has_cache = any(given.get(name) is not None for name in CACHE_NAMES)
            if not self.is_listening or given.get("input_ids") is None or has_cache:
                return
            windows = Windows.parse(given)
            check(windows)
            self._found.append(windows)
            if self.is_full:
                self.close()

        # The backbone is given tokens also where somebody has a head of their own.
        backbone = getattr(model, "base_model", model)
        self._handle = backbone.register_forward_pre_hook(see, with_kwargs=True)

    def close(self) -> None:
        """Watch no longer."""
        self.is_listening = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The windows in tensors, for a checkpoint."""
        return [{"groups": list(windows.groups), "is_masked": windows.is_masked} for windows in self._found]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over the windows of a checkpoint."""
        self._found = [Windows(tuple(each["groups"]), each["is_masked"]) for each in state]


def _is_source(calibration: Any) -> bool:
    return callable(getattr(calibration, "windows", None))
