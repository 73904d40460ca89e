"""Benchmark the pruning of a model of LLaMA's shape with random weights and tokens, phase by phase.

    python scripts/bench_llama7b.py --output bench.json                     # 7B, whole, 128 x 2048 tokens
    python scripts/bench_llama7b.py --config balanced
    python scripts/bench_llama7b.py --model 70b-shape --offload cpu --blocks 4
    python scripts/bench_llama7b.py --blocks 1 --samples 1 --seqlen 128 --config paper,iterations=2

For each phase: seconds, matrix products per second as a fraction of what this machine was measured to do in their
format, and peak memory. Beside it stands what `maiht estimate` predicts for this machine and for others.
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maiht_lightning.estimate.devices import GIB, SHEETS, Device, find_device
from maiht_lightning.estimate.plan import Estimate, Job, estimate
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.reporting.environment import peak_memory_bytes
from maiht_lightning.solvers import resolve_config

# hidden, inner, blocks, heads, key and value heads, vocabulary
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b-shape": (8192, 28672, 80, 64, 8, 32000),
    "tiny": (64, 160, 2, 4, 2, 256),  # for rehearsals
}


def make_config(name: str, blocks: int | None = None) -> LlamaConfig:
    """The config of one of `SHAPES`, with all of its blocks or so many."""
    hidden, inner, all_blocks, heads, kv_heads, vocabulary = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks or all_blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )


def make_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> LlamaForCausalLM:
    """A model with random weights; on the device `meta` with none."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    # Only what is asked for is ever allocated, and where it is asked for.
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.ndim < 2 else weight.normal_(std=0.02)
    # Its buffers are computed, not loaded.
    rotary = type(model.model.rotary_emb)
    with torch.device(device):
        model.model.rotary_emb = rotary(config)
    return model.eval()


def rate_of(phase: str, job: Job, device: Any) -> float:
    """Choose the rate of a phase's products, by the format of most of them."""
    if phase != "solve":
        return device.flops_bf16 if job.itemsize == 2 else device.flops_fp32
    precision = job.spec.on("cpu" if device.is_host else "cuda").config.precision
    if precision in ("fp16x3", "mixed"):
        return device.flops_fp32 if device.is_host else device.flops_bf16
    return device.flops_tf32 if precision == "tf32" else device.flops_fp32


def bench(name: str, blocks: int | None, job: Job, device: torch.device, local: Device | None = None) -> dict[str, Any]:
    """Prune a model of a shape, and say what each phase took beside what it was predicted to take.

    Args:
        name: One of `SHAPES`.
        blocks: Only so many blocks.
        job: How it is pruned.
        device: Where.
        local: What this machine was measured to do; by default it is measured.

    Returns:
        What is written as JSON.
    """
    begun = time.perf_counter()
    home = torch.device("cpu") if job.offload == "cpu" else device
    model = make_model(make_config(name, blocks), getattr(torch, job.dtype), home)
    seconds_to_make = time.perf_counter() - begun
    shape = ModelShape.of(model, name)
    if local is None:
        local = find_device("local", shape.hidden, max(shape.grams))
    windows = torch.randint(0, shape.vocabulary, (job.samples, job.seqlen), generator=torch.Generator().manual_seed(0))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    report = prune(
        model,
        windows,
        method=job.method,
        config=job.config,
        batch_size=job.batch_size,
        device=device,
    )
    seconds = time.perf_counter() - begun

    predicted: dict[str, Estimate] = {"local": estimate(shape, job, local)}
    predicted |= {sheet: estimate(shape, job, SHEETS[sheet]) for sheet in ("a100-80gb", "h100-80gb")}
    measured = {
        "capture": report.capture_seconds,
        "solve": report.solve_seconds,
        "reconstruct": report.reconstruction_seconds,
        "rescale": report.rescaling_seconds,
    }
    phases: dict[str, dict[str, Any]] = {}
    for phase in predicted["local"].phases:
        achieved = phase.flops / measured[phase.name]
        phases[phase.name] = {
            "seconds": measured[phase.name],
            "flops": phase.flops,
            "fraction_of_measured_peak": achieved / rate_of(phase.name, job, local),
            "predicted_seconds": {
                place: next(p.seconds for p in found.phases if p.name == phase.name)
                for place, found in predicted.items()
            },
        }
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "measured_device": asdict(local),
        "model": name,
        "blocks": shape.blocks,
        "job": asdict(job),
        "seconds": seconds,
        "seconds_to_make_the_model": seconds_to_make,
        "peak_bytes": peak_memory_bytes(),
        "predicted_peak_bytes": {place: found.peak.device_bytes for place, found in predicted.items()},
        "sparsity": report.sparsity,
        "phases": phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="7b")
    parser.add_argument("--blocks", type=int, help="Only so many blocks.")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--method", default="maiht")
    parser.add_argument("--config", default="paper", help="A preset, perhaps with changes: paper,precision=tf32.")
    parser.add_argument("--offload", choices=["none", "cpu"], default="none")
    parser.add_argument("--output", type=Path, help="JSON file.")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = Job(
        dtype=options.dtype,
        samples=options.samples,
        seqlen=options.seqlen,
        batch_size=min(options.batch_size, options.samples),
        method=options.method,
        config=resolve_config(options.config, options.method),
        offload=options.offload,
        eval_windows=0,
    )
    result = bench(options.model, options.blocks, job, device)
    print(f"{options.model}, {result['blocks']} blocks, {job.samples} x {job.seqlen} tokens on {result['device']}")
    for name, phase_found in result["phases"].items():
        other = ", ".join(f"{place} {value:.2f} s" for place, value in phase_found["predicted_seconds"].items())
        share = phase_found["fraction_of_measured_peak"]
        print(f"{name}: {phase_found['seconds']:.2f} s, {share:.0%} of the measured peak; predicted: {other}")
    print(f"peak memory {result['peak_bytes'] / GIB:.2f} GiB; in all {result['seconds']:.1f} s")
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
