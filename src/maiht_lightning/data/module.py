"""`TextDataModule`: what the text DataModules share."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..validation import check_at_least, check_fits
from .windows import pack_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]

# Which splits each stage of the Trainer reads.
_STAGE_SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


class TokenWindows(Dataset[Batch]):
    """Windows as a map-style data set.

    Args:
        windows: (windows, seqlen), int64.
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self.windows[index]}


class EpochOrder(Sampler[int]):
    """A random order for each epoch that depends on the seed and the epoch alone.

    A fit that resumes from a checkpoint sees the windows in the order in which the uninterrupted one would have seen
    them. Lightning itself would choose another.

    Args:
        size: Windows in all.
        trainer: The Trainer, which knows the epoch. None: always the first.
    """

    def __init__(self, size: int, trainer: Trainer | None) -> None:
        self.size, self.trainer = size, trainer

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        generator = torch.Generator().manual_seed(torch.initial_seed() + epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()


class ResumingLoader(DataLoader[Batch]):
    """A DataLoader that leaves out the batches of an epoch that were trained on before the checkpoint.

    It counts batches and not windows: with several processes Lightning shares out the sampler's order among them, and
    each process has done as many batches.

    Args:
        dataset: As for `DataLoader`; so are the further keywords.
        trainer: The Trainer, which knows how much of the epoch is done. None: nothing is.
    """

    def __init__(self, dataset: Dataset[Batch], trainer: Trainer | None, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.trainer = trainer

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        done = 0
        if self.trainer is not None and (loop := self.trainer.fit_loop).restarting:
            done = loop.epoch_loop.batch_progress.current.ready
        yield from islice(super().__iter__(), done, None)


class TextDataModule(LightningDataModule):
    r"""Packed token windows of a text with a train, validation and test split.

    Texts are joined by a blank line, tokenized, and cut into whole windows; the training windows are shuffled. A batch
    is a dictionary with `input_ids` (batch, seqlen), int64. Subclasses say in `texts` where the text comes from.

    Args:
        seqlen: Tokens per window.
        batch_size: Windows per batch, on each device.
        num_workers: Processes that load batches; 0 is quickest, as the windows lie in memory.
        tokenizer: Name or folder of a Hugging Face tokenizer. None: the one of the model in training
            (`trainer.lightning_module.tokenizer`).

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self, seqlen: int = 512, batch_size: int = 8, num_workers: int = 0, tokenizer: str | None = None
    ) -> None:
        super().__init__()
        check_at_least(2, seqlen=seqlen)
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        self.seqlen = seqlen
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.tokenizer = tokenizer
        self._windows: dict[str, Tensor] = {}

    def texts(self, split: str) -> list[str]:
        """List the texts of `train`, `validation` or `test`, in order.

        Raises:
            NotImplementedError: The subclass has no texts.
        """
        raise NotImplementedError(f"{type(self).__name__} must say in texts() where its text comes from")

    def prepare_data(self) -> None:
        """Download every split, or find its local copy missing, before any training."""
        for split in ("train", "validation", "test"):
            self.texts(split)

    def setup(self, stage: str) -> None:
        """Cut the windows that the stage needs.

        Raises:
            MisconfigurationException: There is no tokenizer.
            ValueError: A split does not fill one window.
        """
        tokenizer = self._find_tokenizer()
        for split in _STAGE_SPLITS.get(stage, ()):
            self._windows[split] = pack_windows(self.texts(split), tokenizer, self.seqlen, separator="\n\n")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Load training windows, shuffled anew in each epoch; see `EpochOrder` and `ResumingLoader`."""
        windows = self._data("train")
        order = EpochOrder(len(windows), self.trainer)
        return ResumingLoader(windows, self.trainer, sampler=order, **self._loader_settings())

    def val_dataloader(self) -> DataLoader[Batch]:
        """Load validation windows, in order."""
        return DataLoader(self._data("validation"), **self._loader_settings())

    def test_dataloader(self) -> DataLoader[Batch]:
        """Load test windows, in order."""
        return DataLoader(self._data("test"), **self._loader_settings())

    def _data(self, split: str) -> TokenWindows:
        """The windows of a split, which the model in training must be able to take: it is loaded by now."""
        windows = self._windows[split]
        module: Any = getattr(self.trainer, "lightning_module", None)
        for model in () if module is None else module.modules():
            if hasattr(model, "get_input_embeddings"):
                check_fits(f"{split} windows of {type(self).__name__}", windows, model)
                break
        return TokenWindows(windows)

    def _loader_settings(self) -> dict[str, Any]:
        # The last batch may be smaller: dropping it would leave a short text with no batch at all.
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }

    def _find_tokenizer(self) -> "PreTrainedTokenizerBase":
        if self.tokenizer is not None:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)
        model: Any = self.trainer.lightning_module if self.trainer is not None else None
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            found = "no Trainer" if model is None else f"{type(model).__name__} without one"
            raise MisconfigurationException(
                f"{type(self).__name__} must find a tokenizer in the LightningModule's attribute `tokenizer`, but "
                f"found {found}: set `tokenizer` to the name or folder of a Hugging Face tokenizer"
            )
        return tokenizer
