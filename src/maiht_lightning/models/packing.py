"""A sparse weight as bits and values: one bit per weight, and the weights that are not zero.

Everything here is NumPy's, which leaves other threads at work, and needs a tenth of the time of torch's masks.
"""

import numpy as np
import torch
from torch import Tensor

# Weights unpacked at a time, a multiple of 8: their positions, 8 bytes each, stay in a processor's cache.
CHUNK = 2**17


def packed_bytes(weights: int) -> int:
    """Bytes of the bits of so many weights."""
    return -(-weights // 8)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight of any shape and dtype, on the CPU.

    Returns:
        The bits, uint8 (ceil(numel / 8),), eight weights per byte with the first in the highest bit, and 0 for those
        after the last; and the values (kept,), in the weight's dtype. A negative zero counts as a zero.
    """
    flat = weight.detach().contiguous().view(-1)
    kept = (flat != 0).numpy()
    values = _integers(flat)[kept.nonzero()[0]]
    return torch.from_numpy(np.packbits(kept)), torch.from_numpy(values).view(weight.dtype)


def unpack(bits: Tensor, values: Tensor, out: Tensor) -> None:
    """Unpack into a contiguous tensor on the CPU, of the values' dtype.

    Args:
        bits: uint8 (ceil(numel / 8),), as from `pack`.
        values: Weights that are not zero (kept,).
        out: Overwritten with the weight; its shape is the weight's.

    Raises:
        ValueError: There are not as many values as bits that are set.
    """
    packed, source, dense, used = bits.numpy(), _integers(values), _integers(out.view(-1)), 0
    for start in range(0, len(dense), CHUNK):
        part = dense[start : start + CHUNK]
        kept = np.unpackbits(packed[start // 8 : (start + CHUNK) // 8], count=len(part)).view(np.bool_)
        places = kept.nonzero()[0]
        found = source[used : used + len(places)]
        used += len(places)
        part[:] = 0
        if len(found) == len(places):
            part[places] = found
    if used != len(source):
        raise ValueError(f"{len(source)} values for {used} weights")


def _integers(tensor: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.integer]]":
    """A contiguous tensor (n,) as integers of the same size: NumPy knows no bfloat16."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found: np.ndarray[tuple[int], np.dtype[np.integer]] = tensor.view(sizes[tensor.element_size()]).numpy()
    return found
