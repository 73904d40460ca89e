"""`Windows`: token sequences without padding, out of whatever somebody's batches are.

Background: in a causal model, a token of a padded or packed row sees the tokens before it in its own sequence and no
others. So a sequence that is taken out of its row and run alone gives the same hidden states. Behind this door there
is no padding, and nobody has to think of masks.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .randomness import seeded

log = logging.getLogger(__name__)

# As many as 128 windows of 2,048 tokens have, on which papers calibrate. A loader that is made for training may go on
# for ever, or for days.
CALIBRATION_TOKENS = 2**18

_EXPECTED = (
    "windows must be a LongTensor of token ids (samples, seqlen), or batches of them: dictionaries with input_ids and, "
    "where they are padded, attention_mask, or LongTensors, or tuples that begin with one"
)

_ENOUGH = "calibration takes the first %d windows of a %s, which have %d tokens; to take all of them, give a list"


@runtime_checkable
class TokenBatches(Protocol):
    """A DataLoader, a list or anything else that gives batches of token ids when it is iterated over.

    A batch is a dictionary (or `BatchEncoding`, or object) with `input_ids` (windows, seqlen), and with
    `attention_mask` of the same shape where it is padded; a LongTensor (windows, seqlen); or a tuple whose first is
    that tensor and whose second may be its mask of zeros and ones. Padding may be on either side. Where `position_ids`
    begin anew a packed row is taken apart.
    """

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, eq=False)
class Windows:
    """Token sequences without padding, which are batched with those of the same length.

    Args:
        groups: Token ids (windows, seqlen), int64, of each length there is, the longest first.
        is_masked: Whether it was said of all of them which of their tokens are no padding.
    """

    groups: tuple[Tensor, ...]
    is_masked: bool = False

    @classmethod
    def parse(
        cls, source: "Tensor | TokenBatches | Windows", *, tokens: int | None = None, samples: int | None = None
    ) -> "Windows":
        """Read a LongTensor (samples, seqlen), or batches; see `TokenBatches`.

        Loaders that shuffle give the same at each call, and draw nothing from the generators of the caller.

        Args:
            source: Where the windows are.
            tokens: How many are enough: no further batch is asked for, which is logged. A list is read as a whole.
            samples: Take only the first so many windows of batches.

        Raises:
            TypeError, ValueError: It is something else, or a mask cannot be understood. Of a LongTensor nothing is
                checked.
        """
        if isinstance(source, Windows):
            return source
        if isinstance(source, Tensor):
            return cls((source,))
        if isinstance(source, Mapping) and "input_ids" in source:
            # What a tokenizer has returned is one batch, and iterating over it gives names.
            source = [source]
        if not isinstance(source, TokenBatches) or isinstance(source, str | bytes | Mapping):
            raise TypeError(f"{_EXPECTED}; but found {type(source).__name__}")
        if isinstance(source, list | tuple):
            tokens = None
        sequences: list[Tensor] = []
        is_masked, found = True, 0
        with seeded():
            for batch in source:
                if samples is not None and len(sequences) >= samples:
                    break
                if tokens is not None and found >= tokens:
                    log.warning(_ENOUGH, len(sequences), type(source).__name__, found)
                    break
                for ids, mask, positions in _parts(batch):
                    parts = list(_sequences(ids, mask, positions))
                    is_masked &= mask is not None
                    found += sum(len(sequence) for sequence in parts)
                    sequences += parts
        return cls.of(sequences[:samples], is_masked=is_masked)

    @classmethod
    def of(cls, sequences: list[Tensor], *, is_masked: bool) -> "Windows":
        """Group sequences of token ids (seqlen,), int64, by their lengths, in the order in which they are given.

        Raises:
            ValueError: There are none.
        """
        by_length: dict[int, list[Tensor]] = {}
        for sequence in sequences:
            by_length.setdefault(len(sequence), []).append(sequence)
        if not by_length:
            raise ValueError("windows must hold at least one token, but found none in any batch: is the loader empty?")
        return cls(tuple(torch.stack(by_length[length]) for length in sorted(by_length, reverse=True)), is_masked)

    @property
    def samples(self) -> int:
        """Number of windows."""
        return sum(len(group) for group in self.groups)

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(group.numel() for group in self.groups)

    def batches(self, batch_size: int) -> list[Tensor]:
        """Batches of token ids (at most batch_size, seqlen), int64, each of windows of one length."""
        return [batch for group in self.groups for batch in group.split(batch_size)]


Part = tuple[Any, Any, Any]


def _parts(batch: Any) -> Iterator[Part]:
    """The token ids, mask and positions, as they are found in a batch, one or several of each."""
    if isinstance(batch, Tensor):
        yield batch, None, None
    elif isinstance(batch, Mapping):
        if "input_ids" in batch:
            yield batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
            return
        # Several loaders together, each with a name.
        inner = [value for value in batch.values() if isinstance(value, Mapping)]
        if not inner:
            raise TypeError(f"{_EXPECTED}; but found a dictionary with {', '.join(map(str, batch)) or 'nothing'}")
        for value in inner:
            yield from _parts(value)
    elif hasattr(batch, "input_ids"):
        yield batch.input_ids, getattr(batch, "attention_mask", None), getattr(batch, "position_ids", None)
    elif isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        if isinstance(batch, list) and batch[0].ndim == 1:
            # Samples that nobody has collated.
            yield from ((ids, None, None) for ids in batch)
        else:
            yield batch[0], _mask_beside(batch), None
    elif isinstance(batch, list | tuple) and batch and not isinstance(batch[0], int | float | str):
        # Samples that nobody has collated, or several loaders; in a tuple something else may follow, such as labels.
        for value in batch if isinstance(batch, list) else batch[:1]:
            yield from _parts(value)
    else:
        raise TypeError(f"{_EXPECTED}; but found a batch of type {type(batch).__name__}")


def _mask_beside(batch: list[Any] | tuple[Any, ...]) -> Tensor | None:
    """The second of a tuple if it is a mask for the first, and not its labels, which hold token ids."""
    if len(batch) < 2 or not isinstance(batch[1], Tensor) or batch[1].shape != batch[0].shape:
        return None
    ids, mask = batch[0], batch[1]
    return mask if bool(((mask == 0) | (mask == 1)).all()) and not torch.equal(ids, mask.to(ids.dtype)) else None


def _sequences(ids: Any, mask: Any, positions: Any) -> Iterator[Tensor]:
    """The token ids (seqlen,), int64 and in host memory, of each sequence in a batch."""
    if isinstance(ids, list | tuple) and ids and isinstance(ids[0], list | tuple):
        # Rows of different lengths, which nobody has padded.
        for index, row in enumerate(ids):
            row_of = [None if each is None else each[index] for each in (mask, positions)]
            yield from _sequences(row, *row_of)
        return
    if isinstance(ids, list | tuple) and ids and isinstance(ids[0], Tensor):
        raise TypeError(
            "input_ids must be a LongTensor (windows, seqlen), but found a list of tensors, which PyTorch's collation "
            "makes of lists: let the data set give tensors, as with set_format('torch')"
        )
    ids = torch.as_tensor(ids)
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.dtype.is_complex:
        raise TypeError(f"{_EXPECTED}; but found input_ids of {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must have shape (windows, seqlen), but found {tuple(ids.shape)}")
    ids = ids.detach().cpu().long()
    keep, places = _keep(ids, mask), _places(ids, positions)
    for row, kept, place in zip(*(each.view(-1, ids.shape[-1]) for each in (ids, keep, places)), strict=True):
        if not kept.any():
            continue
        if positions is None and int(kept.int().diff().ne(0).sum()) > 2 - int(kept[0]) - int(kept[-1]):
            raise ValueError(
                "attention_mask must mask the ends of a row, but found one with masked tokens between others: give "
                "position_ids with it, which begin at 0 in each sequence of a packed row"
            )
        found = place[kept]
        starts = [0, *(found.diff().ne(1).nonzero().flatten() + 1).tolist(), len(found)]
        for sequence in row[kept].tensor_split(starts[1:-1]):
            # Packed rows are padded with tokens at position 0, each of which looks like a sequence of its own.
            if positions is None or len(sequence) > 1:
                yield sequence


def _keep(ids: Tensor, mask: Any) -> Tensor:
    """Which tokens are no padding: bool, of the shape of the token ids."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = torch.as_tensor(mask).detach().cpu()
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, but found {tuple(mask.shape)}: say "
            f"of packed rows with position_ids, which begin at 0 in each sequence, where one ends"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold 1 for tokens and 0 for padding, but found other values")
    return mask.bool()


def _places(ids: Tensor, positions: Any) -> Tensor:
    """The position of each token in its sequence, of the shape of the token ids."""
    if positions is None:
        return torch.arange(ids.shape[-1]).expand_as(ids)
    positions = torch.as_tensor(positions).detach().cpu().long()
    try:
        return positions.expand_as(ids)
    except RuntimeError as error:
        raise ValueError(
            f"position_ids must have the shape of input_ids, {tuple(ids.shape)}, but found {tuple(positions.shape)}"
        ) from error
