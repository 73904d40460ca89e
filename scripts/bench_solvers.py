"""Time the solvers on real layers, beside the bare matrix products they need and a naive mAIHT.

For each layer and method: seconds, the same as a multiple of mAIHT's bare products with the Gram matrix (measured in
the same run, interleaved), the fraction of the measured product rate that the method's dense algebra reaches, relative
error, and peak memory in matrices of the weight's size. The layers are SmolLM2's, with C4 inputs where `MAIHT_DATA_DIR`
has them, else the Python documentation; `--llama7b` adds LLaMA-7B's shapes with random weights and inputs.

    python scripts/bench_solvers.py --json bench.json
    python scripts/bench_solvers.py --at-least 1.5  # an exit code of 1 if mAIHT is slower, beside the naive one
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from fetch_smollm2 import fetch
from maiht_lightning import C4Calibration, MAIHTConfig, prune_layer
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import accumulate_grams
from maiht_lightning.data.python_docs import PythonDocsCalibration
from maiht_lightning.models.blocks import evaluation_mode, find_blocks, find_linears
from maiht_lightning.models.loading import load_model, load_tokenizer
from maiht_lightning.reporting.environment import environment
from maiht_lightning.solvers import METHODS, admm
from maiht_lightning.solvers.maiht import step_size
from maiht_lightning.solvers.patterns import zeros_of
from maiht_lightning.solvers.precision import float32_products
from maiht_lightning.solvers.problem import scale_gram

BLOCK = 2
LAYERS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
LLAMA_7B = {"attention": (4096, 4096), "gate or up": (11008, 4096), "down": (4096, 11008)}
MEMORY_ITERATIONS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["maiht", "sparsegpt", "admm", "wanda", "magnitude"])
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=["auto", "float32", "tf32", "float64", "fp16x3", "mixed"],
        help="bare products are those of float32 also beside the ones from half precision",
    )
    parser.add_argument("--iterations", type=int, default=50, help="mAIHT's thresholding iterations")
    parser.add_argument("--refine-iterations", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each kind; the median counts")
    parser.add_argument(
        "--llama7b", nargs="*", choices=list(LLAMA_7B), help="add LLaMA-7B's shapes, all or those named"
    )
    parser.add_argument("--only-llama7b", action="store_true", help="leave SmolLM2's layers out")
    parser.add_argument("--no-naive", action="store_true", help="leave the naive mAIHT out")
    parser.add_argument(
        "--at-least", type=float, metavar="TIMES", help="fail unless mAIHT is so many times as fast as the naive one"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    if args.at_least and not has_naive(args):
        parser.error("--at-least needs the naive mAIHT: --methods maiht, --pattern unstructured, --precision float32")
    return args


def has_naive(args: argparse.Namespace) -> bool:
    """Whether the naive mAIHT can stand beside: it is written for one layer-wide threshold in float32."""
    fits = args.pattern == "unstructured" and args.precision == "float32"
    return fits and "maiht" in args.methods and not args.no_naive


def naive_maiht(weight: Tensor, gram: Tensor, sparsity: float, config: MAIHTConfig, step: float) -> Tensor:
    """Algorithm 1 as one would write it down: two gradients and two losses an iteration, and a full sort."""
    norms = gram.diagonal().sqrt()
    dense = weight * norms
    matrix = gram / norms / norms[:, None] + config.mu * torch.eye(len(norms), device=gram.device)
    quantile = 0.05 if sparsity > 0.35 else 0.01 if sparsity < 0.15 else 0.03
    q = dense.abs().flatten().sort().values[int(quantile * (dense.numel() - 1))]
    penalty = q**2 / (2 * step)
    margin = 0.015 if sparsity > 0.35 else 0.01

    def gradient(point: Tensor) -> Tensor:
        return (point - dense) @ matrix

    def objective(point: Tensor) -> Tensor:
        return 0.5 * (((point - dense) @ matrix) * (point - dense)).sum() + penalty * (point != 0).sum()

    def threshold(point: Tensor) -> Tensor:
        return torch.where(point.abs() >= (2 * penalty * step).sqrt(), point, 0)

    now, before, fast, t, t_before = dense, dense, dense, 1.0, 0.0
    for _ in range(config.iterations):
        penalty = penalty * (1 + sparsity - margin - (now == 0).float().mean())
        ahead = now + t_before / t * (fast - now) + (t_before - 1) / t * (now - before)
        fast = threshold(ahead - step * gradient(ahead))
        plain = threshold(now - step * gradient(now))
        before, now = now, fast if objective(fast) <= objective(plain) else plain
        t_before, t = t, (1 + (1 + 4 * t**2) ** 0.5) / 2
    keep = dense.numel() - zeros_of(sparsity, dense.numel())
    mask = torch.zeros(dense.numel(), dtype=torch.bool, device=dense.device)
    mask[now.abs().flatten().sort(descending=True).indices[:keep]] = True
    mask = mask.view_as(dense)
    now = now * mask
    for _ in range(config.refine_iterations):
        now = (now - step * gradient(now)) * mask
    return now / norms


def real_layers(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and Gram matrix of layers of one block of SmolLM2, the blocks before it dense."""
    source = str(fetch())
    model, tokenizer = load_model(source).to(device), load_tokenizer(source)
    if os.environ.get("MAIHT_DATA_DIR"):
        windows = C4Calibration(samples=16, sampling="packed").windows(tokenizer, 512)
    else:
        windows = PythonDocsCalibration(samples=16, seqlen=512).windows(tokenizer, 512)
    blocks = find_blocks(model).modules
    with evaluation_mode(model):
        inputs = record_inputs(model, blocks, windows.split(4))
        for block in blocks[:BLOCK]:
            inputs.pass_through(block)
        groups = accumulate_grams(blocks[BLOCK], inputs)
    grams = {name: group.gram.float() for group in groups for name in group.names}
    linears = find_linears(blocks[BLOCK])
    return {name: (linears[name].weight.detach().clone(), grams[name]) for name in LAYERS}  # type: ignore[operator]


def random_layer(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device)
    inputs = torch.randn(shape[1] + 512, shape[1], generator=generator, device=device)
    inputs *= torch.rand(shape[1], generator=generator, device=device)
    return weight, inputs.T @ inputs


def algebra_flops(method: str, shape: torch.Size, config: MAIHTConfig) -> float:
    """Floating-point operations of a method's products and factorisations; 0 where it has none."""
    out, inputs = shape
    product, cube = 2 * out * inputs**2, inputs**3
    return {
        **dict.fromkeys(("maiht", "naive mAIHT"), (2 * config.iterations + config.refine_iterations) * product),
        **dict.fromkeys(("aiht", "iht"), (config.iterations + config.refine_iterations) * product),
        # Cholesky and a triangular inverse, a third of n³ each; the updates of later columns, half a product.
        "sparsegpt": 2 * cube / 3 + product / 2,
        # Cholesky and the inverse from it; A·B and a product a step.
        "admm": cube + (1 + admm.STEPS) * product,
    }.get(method, 0)


def timed(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def error_of(pruned: Tensor, weight: Tensor, gram: Tensor) -> float:
    change, dense, matrix = (pruned - weight).double(), weight.double(), gram.double()
    return float(((change @ matrix) * change).sum() / ((dense @ matrix) * dense).sum())


def bench_layer(name: str, weight: Tensor, gram: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    config = MAIHTConfig(iterations=args.iterations, refine_iterations=args.refine_iterations, precision=args.precision)
    few = MAIHTConfig(iterations=MEMORY_ITERATIONS, refine_iterations=MEMORY_ITERATIONS, precision=args.precision)
    products = 2 * args.iterations + args.refine_iterations
    out, typed = torch.empty_like(weight, dtype=config.dtype), weight.to(config.dtype)
    matrix = gram.to(config.dtype)

    def bare() -> None:
        with float32_products(tf32=args.precision == "tf32"):
            for _ in range(products):
                torch.matmul(typed, matrix, out=out)

    def run(method: str, settings: MAIHTConfig = config) -> Any:
        return prune_layer(weight, gram, sparsity=args.sparsity, pattern=args.pattern, method=method, config=settings)

    actions: dict[str, Callable[[], Any]] = {method: partial(run, method) for method in args.methods}
    if has_naive(args):
        step = step_size(scale_gram(gram), config)
        actions["naive mAIHT"] = lambda: naive_maiht(weight, gram, args.sparsity, config, step)

    torch.matmul(typed, matrix, out=out)  # the first product sets the library up
    seconds: dict[str, list[float]] = {"bare": [], **{key: [] for key in actions}}
    results = {}
    for _ in range(args.repeats):  # interleaved, so that a slow moment of the machine meets them all
        seconds["bare"].append(timed(bare, args.device)[0])
        for key, action in actions.items():
            elapsed, results[key] = timed(action, args.device)
            seconds[key].append(elapsed)

    product_seconds = median(seconds["bare"])
    flops = 2 * weight.numel() * weight.shape[1] * products
    rows = []
    for key in actions:
        taken = median(seconds[key])
        peak = None
        if key in METHODS:
            with MemTracker() as tracker:
                run(key, few)
            peak = max(stats["Total"] for stats in tracker.get_tracker_snapshot("peak").values())
        pruned = results[key] if isinstance(results[key], Tensor) else results[key].weight
        rows.append(
            {
                "layer": name,
                "shape": list(weight.shape),
                "method": key,
                "seconds": taken,
                "times_bare_products": taken / product_seconds,
                "fraction_of_product_rate": algebra_flops(key, weight.shape, config) / taken * product_seconds / flops,
                "product_gflops": flops / product_seconds / 1e9,
                "relative_error": error_of(pruned, weight, gram),
                "peak_weight_matrices": peak / (weight.numel() * config.dtype.itemsize) if peak else None,
            }
        )
    return rows


def main() -> None:
    args = parse_arguments()
    layers = {} if args.only_llama7b else real_layers(args.device)
    rows = [row for name, layer in layers.items() for row in bench_layer(name, *layer, args)]
    wanted = LLAMA_7B if args.llama7b == [] or (args.only_llama7b and not args.llama7b) else args.llama7b or []
    for name in wanted:
        rows += bench_layer(f"LLaMA-7B {name}", *random_layer(LLAMA_7B[name], args.device), args)

    table = Table("layer", "out × in", "method", title=f"{args.pattern}, {args.precision}, {args.device}")
    for heading in ("seconds", "× bare products", "of product rate", "relative error", "memory / weight"):
        table.add_column(heading, justify="right")
    for row in rows:
        fraction, memory = row["fraction_of_product_rate"], row["peak_weight_matrices"]
        table.add_row(
            row["layer"],
            f"{row['shape'][0]} × {row['shape'][1]}",
            row["method"],
            f"{row['seconds']:.3f}",
            f"{row['times_bare_products']:.3f}",
            f"{fraction:.0%}" if fraction else "",
            f"{row['relative_error']:.5f}",
            f"{memory:.1f}" if memory else "",
        )
    Console(width=120).print(table)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        found = {"settings": settings, "environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.at_least:
        require_speed(rows, args.at_least)


def require_speed(rows: list[dict[str, Any]], times: float) -> None:
    """Exit with an error unless mAIHT is so many times as fast as the naive one on every layer."""
    seconds = {(row["layer"], row["method"]): row["seconds"] for row in rows}
    ratios = {layer: seconds[layer, "naive mAIHT"] / seconds[layer, "maiht"] for layer, _ in seconds}
    if slow := {layer: ratio for layer, ratio in ratios.items() if ratio < times}:
        found = ", ".join(f"{ratio:.2f} for {layer}" for layer, ratio in slow.items())
        raise SystemExit(f"mAIHT must be {times:g} times as fast as written naively, but found {found}")


if __name__ == "__main__":
    main()
