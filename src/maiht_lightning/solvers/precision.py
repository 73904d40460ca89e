"""The accuracy of products: float32 whatever the process is set to, and float32 from half-precision products.

GPUs multiply fp16 matrices with float32 sums many times as fast as float32 ones. A float32 number is, but for its last
two bits, the sum of two fp16 numbers, its high and its low part, if a power of two brings it into their range; so

    R C ≈ R_h C_h + R_h C_l + R_l C_h

is one product of stacked matrices, [R_h | R_h | −R_l] with [C_h; C_l; −C_h] (`fp16x3`). What is left out, R_l C_l, is
about 2⁻²² of the result. The first term alone is `fp16`: as many significant bits as TF32, at twice its rate.

Splitting so is after Markidis et al. (IPDPS Workshops 2018) and Ootomo & Yokota (IJHPCA 2022, arXiv 2203.03341).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "float64", "tf32", "fp16x3", "mixed"]
Form = Literal["plain", "fp16x3", "fp16"]

# Scaled entries stay below 2¹⁵, fp16's largest is near 2¹⁶. A power of two for tiny ones ends here, so that it and that
# of the other factor add up to one of float32.
TOP, LIMIT = 15, 60


def can_multiply_halves(device: torch.device | str) -> bool:
    """Whether a device multiplies fp16 matrices with float32 sums: GPUs natively, CPUs by the same rounded numbers."""
    device = torch.device(device)
    if device.type == "cpu":
        return True
    if device.type != "cuda" or "dtype_out" not in torch.ops.aten.mm.overloads():  # since PyTorch 2.8
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (7, 0)


def resolve_precision(precision: Precision, device: torch.device | str) -> Precision:
    """What `auto` is on a device: `mixed` on GPUs that can, `float32` elsewhere. Others are what they are.

    Raises:
        ValueError: The device has no such products.
    """
    able = can_multiply_halves(device)
    if precision == "auto":
        return "mixed" if able and torch.device(device).type != "cpu" else "float32"
    if precision in ("fp16x3", "mixed") and not able:
        raise ValueError(
            f"precision {precision!r} needs products of fp16 matrices with float32 sums: a CPU, or a CUDA device of "
            f"compute capability 7.0 and PyTorch 2.8 or newer, but found {device} and PyTorch {torch.__version__}: "
            f"take 'float32' or 'tf32'"
        )
    return precision


def search_form(precision: Precision) -> Form:
    """How products are computed while a support is sought, by the precision that was resolved."""
    return "fp16" if precision == "mixed" else final_form(precision)


def final_form(precision: Precision) -> Form:
    """How products of final weights are computed, by the precision that was resolved."""
    return "fp16x3" if precision in ("fp16x3", "mixed") else "plain"


def error_form(precision: Precision, device: torch.device | str) -> Form:
    """How a layer's error is multiplied, by the precision that was resolved: as exactly as in float32, and fast."""
    on_gpu = torch.device(device).type == "cuda" and can_multiply_halves(device)
    return "fp16x3" if precision == "tf32" and on_gpu else final_form(precision)


def bytes_per_entry(precision: Precision) -> int:
    """Bytes that a `Multiplier` for final weights keeps for each entry of its matrix."""
    return 6 if final_form(precision) == "fp16x3" else 8 if precision == "float64" else 4


class Left(NamedTuple):
    """Room for a matrix R (rows, in) as a `Multiplier` takes it.

    Args:
        matrix: R as it is; or fp16, R_h (rows, in) or [R_h | R_h | −R_l] (rows, 3 in) of R · 2^exponents.
        exponents: (rows, 1), int32: every row has a power of two of its own, so that small ones are as accurate as
            large ones. None where R is as it is.
        parts: 0 as it is, or the number of fp16 matrices beside each other.
    """

    matrix: Tensor
    exponents: Tensor | None
    parts: int

    def rows(self, number: int) -> "Left":
        """The first so many rows."""
        exponents = None if self.exponents is None else self.exponents[:number]
        return Left(self.matrix[:number], exponents, self.parts)

    def fill(self, values: Tensor) -> None:
        """Take a matrix (rows, in), which may be `matrix` itself where that has it as it is."""
        if self.exponents is None:
            if values is not self.matrix:
                self.matrix.copy_(values)
            return
        largest = torch.linalg.vector_norm(values, inf, dim=1, keepdim=True)
        torch.clamp_max(TOP - torch.frexp(largest).exponent, LIMIT, out=self.exponents)
        scale = _power_of_two(self.exponents)
        high, *low = self.matrix.view(len(values), self.parts, -1).split(2, dim=1)
        torch.mul(values.unsqueeze(1).expand_as(high), scale.unsqueeze(1), out=high)
        if low:
            # R_h − R is computed in float32, where it is exact, and rounded to fp16.
            torch.addcmul(high.select(1, 0), values, scale, value=-1, out=low[0].squeeze(1))


class Multiplier:
    """Multiplies matrices (rows, in) from the right by one matrix (in, n), of which it keeps what the form needs.

    Nothing waits for the device when it is called.

    Args:
        matrix: (in, n), mostly square, float32, or for `plain` any dtype.
        form: `plain`: as torch multiplies matrices of this dtype, see `float32_products`. `fp16x3`: as float32 does,
            from half-precision products. `fp16`: both sides rounded to 11 significant bits, float32 sums.

    Attributes:
        device: Where the matrix is.
        exponent: Of the power of two by which it was multiplied.
    """

    def __init__(self, matrix: Tensor, form: Form = "plain") -> None:
        self.form, self.device = form, matrix.device
        self._inputs, self.exponent, self._right = matrix.shape[0], 0, matrix
        if form == "plain":
            return
        self.exponent = min(LIMIT, TOP - int(torch.frexp(matrix.abs().max()).exponent))
        scaled = matrix * 2.0**self.exponent
        high = scaled.half()
        if form == "fp16x3":
            low = scaled.sub_(high).half()
            high = torch.cat([high, low, -high])
        # A CPU multiplies the rounded numbers in float32, where products of two of them are exact: what a GPU does, but
        # for the order of the sums.
        self._right = high if matrix.is_cuda else high.float()

    def rough(self) -> "Multiplier":
        """The same as `fp16` from one that is `fp16x3`, which takes no more memory."""
        other = copy.copy(self)
        other.form, other._right = "fp16", self._right[: self._inputs]
        return other

    def to(self, device: torch.device | str) -> "Multiplier":
        """The same on another device."""
        other = copy.copy(self)
        other.device, other._right = torch.device(device), self._right.to(device)
        if self.form != "plain" and not other._right.is_cuda:
            other._right = other._right.float()
        return other

    def left(self, rows: int) -> Left:
        """Room for a matrix (rows, in) to be multiplied."""
        if self.form == "plain":
            return Left(self._right.new_empty(rows, self._inputs), None, 0)
        parts = 3 if self.form == "fp16x3" else 1
        matrix = torch.empty(rows, parts * self._inputs, dtype=torch.float16, device=self.device)
        return Left(matrix, torch.zeros(rows, 1, dtype=torch.int32, device=self.device), parts)

    def left_for(self, values: Tensor) -> Left:
        """The same for a matrix (rows, in) that is multiplied each time it has changed: itself where that will do."""
        return Left(values, None, 0) if self.form == "plain" else self.left(len(values))

    def product(self, left: Left, out: Tensor | None = None) -> Tensor:
        """What was put in that room times the matrix: (rows, n), but for the `scale` of its rows."""
        if self.form == "plain":
            return torch.mm(left.matrix, self._right, out=out)
        if left.matrix.is_cuda:
            return torch.mm(left.matrix, self._right, out_dtype=torch.float32, **({} if out is None else {"out": out}))
        return torch.mm(left.matrix.float(), self._right, out=out)

    def __call__(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """The product of a matrix (rows, in) with the matrix (in, n); `out` (rows, n) is overwritten."""
        left = self.left_for(values)
        left.fill(values)
        product = self.product(left, out)
        return product if left.exponents is None else product.mul_(scale(left.exponents, self.exponent))


def scale(exponents: Tensor, exponent: int) -> Tensor:
    """By what the rows of a product are still to be multiplied, float32 (rows, 1).

    Args:
        exponents: The `Left`'s, (rows, 1).
        exponent: The `Multiplier`'s.
    """
    return _power_of_two((-exponent - exponents).clamp_max_(127))


class Products(NamedTuple):
    """Products with one matrix (in, in).

    Args:
        search: While a support is sought.
        final: Of the weights on it.
    """

    search: Multiplier
    final: Multiplier

    @classmethod
    def of(cls, matrix: Tensor, precision: Precision) -> "Products":
        """Prepare both for a precision that was resolved; the matrix (in, in) may be kept as it is."""
        final = Multiplier(matrix, final_form(precision))
        return cls(final.rough() if search_form(precision) == "fp16" else final, final)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to whole numbers between −126 and 127, exactly: float32."""
    return (exponent.int() + 127 << 23).view(torch.float32)


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Compute float32 products exactly as float32, or on CUDA with TF32 inputs, and restore the setting.

    A training run often calls `torch.set_float32_matmul_precision("medium")`, which would reach the solvers; or lets
    sums of half-precision products be rounded to half precision. Within, PyTorch's older functions that ask for the
    setting may raise.
    """
    cuda: Any = torch.backends.cuda.matmul
    mkldnn: Any = torch.backends.mkldnn
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")
    settings: list[tuple[Any, str, Any]] = [(cuda, name, False) for name in names if hasattr(cuda, name)]
    if hasattr(cuda, "fp32_precision"):  # since PyTorch 2.9, which objects to a mix of the two ways
        settings += [(cuda, "fp32_precision", "tf32" if tf32 else "ieee"), (mkldnn.matmul, "fp32_precision", "ieee")]
    before = [getattr(backend, name) for backend, name, _ in settings]
    old = None if hasattr(cuda, "fp32_precision") else torch.get_float32_matmul_precision()
    try:
        for backend, name, value in settings:
            setattr(backend, name, value)
        if old is not None:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        for (backend, name, _), value in zip(settings, before, strict=True):
            setattr(backend, name, value)
        if old is not None:
            torch.set_float32_matmul_precision(old)
