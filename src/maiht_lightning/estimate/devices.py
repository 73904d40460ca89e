"""What machines can do: data sheets, and measurements of this one."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..solvers.precision import float32_products

GIB = 2.0**30
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """A device that computes.

    Args:
        name: As given to `maiht estimate`.
        memory: Bytes.
        half: Operations a second in products of bfloat16 matrices.
        single: The same for float32, TF32 not allowed.
        tf32: The same with TF32; where there is none, as `single`.
        bandwidth: Bytes a second that its memory reads and writes.
        fresh: The same where each result goes to memory that is asked for anew, as in a forward pass. On GPUs PyTorch
            keeps what was freed, so that there is no difference.
        link: Bytes a second from host memory; infinite where that is its own.
        base: Bytes that libraries take before any work.
    """

    name: str
    memory: float
    half: float
    single: float
    tf32: float
    bandwidth: float
    fresh: float
    link: float = float("inf")
    base: float = 0.0


# Of the data sheets' figures (dense, without sparsity) large products reach about 70 %, memory 80 %, links 80 %. The
# libraries and CUDA's context take about half a GiB.
def _sheet(name: str, gib: float, half: float, single: float, tf32: float, tb: float, link: float) -> Device:
    half, single, tf32 = (0.7 * TERA * rate for rate in (half, single, tf32))
    bandwidth = 0.8e12 * tb
    return Device(name, gib * GIB, half, single, tf32, bandwidth, fresh=bandwidth, link=0.8e9 * link, base=GIB / 2)


# Memory in GiB as the driver counts it; TFLOP/s; TB/s; GB/s. Source: NVIDIA's data sheets of the SXM or desktop cards.
SHEETS = {
    device.name: device
    for device in (
        _sheet("a100-40gb", 39.4, 312, 19.5, 156, 1.555, 32),
        _sheet("a100-80gb", 79.2, 312, 19.5, 156, 2.039, 32),
        _sheet("h100-80gb", 79.2, 989, 67, 494, 3.35, 64),
        _sheet("h200", 139.8, 989, 67, 494, 4.8, 64),
        _sheet("l40s", 44.5, 362, 91.6, 183, 0.864, 32),
        _sheet("rtx4090", 23.6, 165, 82.6, 82.6, 1.008, 32),
    )
}


def find_device(name: str, width: int = 1024, inner: int = 4096) -> Device:
    """A device by name; `local` is measured, with products of a model's own shape.

    Args:
        name: One of `SHEETS`, or `local`.
        width: Columns of the model's hidden states.
        inner: Columns of its widest layer's input.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "local":
        return measure(width, inner)
    if name not in SHEETS:
        raise ValueError(f"gpu: expected one of {', '.join(SHEETS)} or local, but found {name!r}")
    return SHEETS[name]


def measure(width: int, inner: int) -> Device:
    """This machine's GPU, or its CPU where it has none."""
    if torch.cuda.is_available():
        place = torch.device("cuda")
        memory, base, link = float(torch.cuda.mem_get_info(place)[1]), GIB / 2, _rate_of_copies(place)
    else:
        import psutil

        place, link = torch.device("cpu"), float("inf")
        memory, base = float(psutil.virtual_memory().total), float(psutil.Process().memory_info().rss)
    # Whatever the process has set for its own products.
    with float32_products(tf32=False):
        single = _rate_of_products(place, torch.float32, width, inner)
    with float32_products(tf32=True):
        tf32 = _rate_of_products(place, torch.float32, width, inner)
    return Device(
        name="local",
        memory=memory,
        half=_rate_of_products(place, torch.bfloat16, width, inner),
        single=single,
        tf32=tf32 if place.type == "cuda" else single,
        bandwidth=_bandwidth(place, fresh=False),
        fresh=_bandwidth(place, fresh=True),
        link=link,
        base=base,
    )


def _rate_of_products(place: torch.device, dtype: torch.dtype, width: int, inner: int) -> float:
    # Large enough for the device to show what it can, and not much larger.
    work = 4e11 if place.type == "cuda" else 4e9
    rows = max(64, min(8192 if place.type == "cuda" else 2048, int(work / (2 * width * inner))))
    tokens = torch.randn(rows, width, device=place).to(dtype)
    weight = torch.randn(width, inner, device=place).to(dtype)
    out = tokens @ weight
    return 2.0 * tokens.numel() * inner / _seconds(place, lambda: torch.mm(tokens, weight, out=out))


def _bandwidth(place: torch.device, *, fresh: bool) -> float:
    # As large as what a model moves, beyond the caches.
    one, other = torch.randn(2, 2**24, device=place)
    out = None if fresh else torch.empty_like(one)
    return 3.0 * 4 * one.numel() / _seconds(place, lambda: torch.add(one, other, out=out))


def _rate_of_copies(place: torch.device) -> float:
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=place)
    return host.numel() / _seconds(place, lambda: there.copy_(host, non_blocking=True))


def _seconds(place: torch.device, work: Callable[[], object]) -> float:
    """Of one call, the median of several groups of calls."""

    def finish() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    times = []
    for _ in range(7):
        finish()
        start = time.perf_counter()
        for _ in range(3):
            work()
        finish()
        times.append((time.perf_counter() - start) / 3)
    return sorted(times)[len(times) // 2]
