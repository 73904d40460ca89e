"""Measure compact files: their size, and how long they take to load beside the dense safetensors files.

    python scripts/bench_compact.py
    python scripts/bench_compact.py --at-most 2    # an exit code of 1 if loading takes more than twice as long

The model is pruned by magnitude in bfloat16 and written as a Hugging Face folder and as compact files, checksums
included. Both are loaded in turn, from the system's file cache, and the median counts. `from_pretrained` maps its file
and leaves the reading to whoever uses the weights first, so that a second ratio has the time until each was read
once.
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fetch_smollm2 import fetch
from maiht_lightning import count_zeros, load_compact, load_model, prune, save_compact
from maiht_lightning.reporting.environment import environment


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name, folder or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7])
    parser.add_argument("--repeats", type=int, default=9, help="loads of each kind; the median counts")
    parser.add_argument("--at-most", type=float, metavar="TIMES", help="fail if loading takes more times as long")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def packed_share(folder: Path, layers: list[str]) -> float:
    """Bytes of pruned layers in compact files, as a fraction of what they take dense."""
    stored = dense = 0
    for name, tensor in json.loads((folder / "compact.json").read_text())["tensors"].items():
        if name.removesuffix(".weight") not in layers:
            continue
        with safe_open(folder / tensor["file"], framework="pt") as file:
            parts = [file.get_tensor(part) for part in tensor["xxh3"]]
        stored += sum(part.nbytes for part in parts)
        dense += torch.Size(tensor["shape"]).numel() * getattr(torch, tensor["dtype"]).itemsize
    return stored / dense


@torch.no_grad()
def timed(load: Callable[[], nn.Module]) -> tuple[float, float]:
    """Seconds until a model is there, and until every one of its weights was read once."""
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.sum()
    return loaded - start, time.perf_counter() - start


def bench(source: str, sparsity: float, repeats: int, work: Path) -> dict[str, Any]:
    """Write a model both ways and load both in turn."""
    model = load_model(source, torch.bfloat16)
    tokens = torch.zeros(1, 8, dtype=torch.long) + torch.arange(8)
    prune(model, tokens, method="magnitude", sparsity=sparsity, progress=False)
    dense, small = work / f"dense-{sparsity}", work / f"compact-{sparsity}"
    model.save_pretrained(dense)
    start = time.perf_counter()
    save_compact(model, small)
    saved = time.perf_counter() - start
    layers = [count.name for count in count_zeros(model)]
    del model
    kinds: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: AutoModelForCausalLM.from_pretrained(dense, dtype="auto"),
        "compact": lambda: load_compact(small),
    }
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for repeat in range(1 + repeats):
        for kind, load in kinds.items():  # in turn, so that a slow moment of the machine meets both
            found = timed(load)
            if repeat:  # the first has libraries to load
                seconds[kind].append(found)
    loaded, read = ({kind: median(s[i] for s in found) for kind, found in seconds.items()} for i in (0, 1))
    return {
        "sparsity": sparsity,
        "share_of_dense_bytes": packed_share(small, layers),
        "seconds_saving": saved,
        "seconds_loading": loaded,
        "seconds_loading_and_reading": read,
        "times_dense_loading": loaded["compact"] / loaded["dense"],
        "times_dense_loading_and_reading": read["compact"] / read["dense"],
    }


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    source = args.model or str(fetch())
    with tempfile.TemporaryDirectory() as work:
        rows = [bench(source, sparsity, args.repeats, Path(work)) for sparsity in args.sparsity]
    for row in rows:
        loaded, read = row["seconds_loading"], row["seconds_loading_and_reading"]
        print(
            f"{row['sparsity']:.0%} zeros: pruned layers take {row['share_of_dense_bytes']:.4f} of their dense bytes; "
            f"loading takes {loaded['compact']:.3f} s, dense {loaded['dense']:.3f} s: {row['times_dense_loading']:.2f} "
            f"times as long; until all is read {read['compact']:.3f} s and {read['dense']:.3f} s: "
            f"{row['times_dense_loading_and_reading']:.2f} times"
        )
    if args.json:
        settings = {"model": Path(source).name if Path(source).exists() else source, "repeats": args.repeats}
        content = {"settings": settings, "environment": environment(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.at_most and (slow := max(row["times_dense_loading"] for row in rows)) > args.at_most:
        raise SystemExit(f"loading must take at most {args.at_most:g} times as long as dense, but found {slow:.2f}")


if __name__ == "__main__":
    main()
