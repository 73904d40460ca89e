"""Measure what frozen zeros cost in a training step: the share of the step that masking takes.

    python scripts/bench_frozen.py --json frozen.json

A step is forward and backward pass, clipping and AdamW on random tokens; the masks are those of a model pruned by
magnitude. Gradients and weights are masked once each, as `FrozenSparsity` and `freeze` do.
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

from fetch_smollm2 import fetch
from maiht_lightning import freeze, prune
from maiht_lightning.models.loading import load_model
from maiht_lightning.reporting.environment import environment


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name, folder or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=8, help="after a first one, which does not count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    source = args.model or str(fetch())
    model = load_model(source).to(args.device)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch_size, args.seqlen), device=args.device)
    prune(model, tokens, method="magnitude", sparsity=args.sparsity, progress=False)
    frozen = freeze(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def now() -> float:
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    masking, whole = [], []
    for _ in range(1 + args.steps):
        start = now()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        computed = now()
        frozen.apply_to_gradients()
        masked = now()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        stepped = now()
        frozen.apply_to_weights()
        end = now()
        optimizer.zero_grad()
        masking.append(masked - computed + end - stepped)
        whole.append(end - start)
    frozen.verify()

    results = {
        "frozen_weights": frozen.count,
        "seconds_a_step": median(whole[1:]),
        "seconds_masking": median(masking[1:]),
        "share_of_a_step": median(masking[1:]) / median(whole[1:]),
    }
    print(f"{frozen.count:,} frozen weights; {args.batch_size} × {args.seqlen} tokens a step on {args.device}")
    print(f"a step takes {results['seconds_a_step']:.3f} s, {results['share_of_a_step']:.2%} of it masking")
    if args.json:
        settings = {
            "model": Path(source).name if Path(source).exists() else source,
            **{name: value for name, value in vars(args).items() if name not in ("model", "json")},
        }
        found = {"settings": settings, "environment": environment(), "results": results}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
