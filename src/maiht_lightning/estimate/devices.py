"""What devices can do: figures of data sheets, and measurements of this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..solvers.precision import float32_products
from ..validation import did_you_mean

GIB = 2.0**30
TERA = 1e12
# Seconds after which a kind of work has been measured often enough.
LONG_ENOUGH = 1.0


@dataclass(frozen=True)
class Device:
    """A device that computes.

    Args:
        name: As given to `maiht estimate`.
        memory: Bytes.
        flops_bf16: Operations per second in products of bfloat16 matrices.
        flops_fp32: Operations per second in products of float32 matrices, TF32 not allowed.
        flops_tf32: Operations per second in products of float32 matrices with TF32; as `flops_fp32` where there is no
            TF32.
        bandwidth: Bytes per second that its memory reads and writes.
        bandwidth_uncached: Bytes per second where each result goes to memory that is newly allocated, as in a forward
            pass: a CPU must first get it from the system. On GPUs PyTorch's allocator keeps what was freed, so that
            there is no difference.
        host_link: Bytes per second from host memory; infinite where the device's memory is the host's.
        baseline_bytes: Bytes that libraries take before any work.
    """

    name: str
    memory: float
    flops_bf16: float
    flops_fp32: float
    flops_tf32: float
    bandwidth: float
    bandwidth_uncached: float
    host_link: float = float("inf")
    baseline_bytes: float = 0.0

    @property
    def is_host(self) -> bool:
        """Whether the device computes in the host's own memory, as a CPU does."""
        return self.host_link == float("inf")


def _sheet(name: str, gib: float, bf16: float, fp32: float, tf32: float, tb: float, link: float) -> Device:
    """Make a device of its data sheet: GiB, TFLOP/s without sparsity, TB/s of its memory, GB/s of its link."""
    # Large products reach about 70 % of a data sheet's rate, memory and links 80 %. The libraries and CUDA's context
    # take about half a GiB.
    flops_bf16, flops_fp32, flops_tf32 = (0.7 * TERA * rate for rate in (bf16, fp32, tf32))
    bandwidth = 0.8e12 * tb
    return Device(
        name=name,
        memory=gib * GIB,
        flops_bf16=flops_bf16,
        flops_fp32=flops_fp32,
        flops_tf32=flops_tf32,
        bandwidth=bandwidth,
        bandwidth_uncached=bandwidth,
        host_link=0.8e9 * link,
        baseline_bytes=GIB / 2,
    )


# Source: NVIDIA's data sheets of the SXM or desktop cards; the memory is as the driver counts it.
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
    """Find a device by name; `local` is measured, with products of a model's own shape.

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
        asked = did_you_mean(name, SHEETS)
        raise ValueError(f"gpu must be one of {', '.join(SHEETS)} or local, but found {name!r}{asked}")
    return SHEETS[name]


def measure(width: int, inner: int) -> Device:
    """Measure this machine's GPU, or its CPU where it has none, with products (tokens, width) x (width, inner)."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        memory, baseline, link = float(torch.cuda.mem_get_info(device)[1]), GIB / 2, _rate_of_copies(device)
    else:
        import psutil

        device, link = torch.device("cpu"), float("inf")
        memory, baseline = float(psutil.virtual_memory().total), float(psutil.Process().memory_info().rss)
    # The process may have set TF32 for its own products: what is measured must not depend on it.
    with float32_products(tf32=False):
        fp32 = _rate_of_products(device, torch.float32, width, inner)
    tf32 = fp32  # which CPUs have no products in
    if device.type == "cuda":
        with float32_products(tf32=True):
            tf32 = _rate_of_products(device, torch.float32, width, inner)
    return Device(
        name="local",
        memory=memory,
        flops_bf16=_rate_of_products(device, torch.bfloat16, width, inner),
        flops_fp32=fp32,
        flops_tf32=tf32,
        bandwidth=_bandwidth(device, reuse=True),
        bandwidth_uncached=_bandwidth(device, reuse=False),
        host_link=link,
        baseline_bytes=baseline,
    )


def _rate_of_products(device: torch.device, dtype: torch.dtype, width: int, inner: int) -> float:
    """Measure operations per second of products (rows, width) x (width, inner)."""
    # The product is large enough for the device to show what it can, and not much larger.
    work = 4e11 if device.type == "cuda" else 4e9
    rows = max(64, min(8192 if device.type == "cuda" else 2048, int(work / (2 * width * inner))))
    tokens = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(width, inner, device=device).to(dtype)
    out = tokens @ weight
    return 2.0 * tokens.numel() * inner / _seconds(device, lambda: torch.mm(tokens, weight, out=out))


def _bandwidth(device: torch.device, *, reuse: bool) -> float:
    """Measure bytes per second of sums, whose result goes to the same memory each time or to newly allocated one."""
    # 64 MiB per vector, as a model moves it, lie beyond the caches.
    one, other = torch.ones(2, 2**24, device=device)
    out = torch.empty_like(one) if reuse else None
    return 3.0 * 4 * one.numel() / _seconds(device, lambda: torch.add(one, other, out=out))


def _rate_of_copies(device: torch.device) -> float:
    """Measure bytes per second of copies from pinned host memory."""
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    copy = torch.empty_like(host, device=device)
    return host.numel() / _seconds(device, lambda: copy.copy_(host, non_blocking=True))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Measure the seconds of one call: the median of several groups of calls, fewer where they take long."""

    def finish() -> None:
        # A GPU works on its own: its clock is read when all of its work is done.
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(7):
        finish()
        start = time.perf_counter()
        for _ in range(3):
            work()
        finish()
        times.append((time.perf_counter() - start) / 3)
        # A CPU without bfloat16 products takes a second for each of them.
        if 3 * sum(times) > LONG_ENOUGH:
            break
    return sorted(times)[len(times) // 2]
