"""Prune one model by several methods from the same calibration windows and compare perplexities.

Real text: C4 for calibration, WikiText-2 test for perplexity, from `MAIHT_DATA_DIR` or the Hugging Face hub.

    python scripts/compare_methods.py --methods maiht wanda wanda:row magnitude --sparsity 0.5
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fetch_smollm2 import fetch
from maiht_lightning import C4Calibration, prune
from maiht_lightning.data.windows import evaluation_windows
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models.loading import load_model, load_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name, folder or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["maiht", "wanda", "wanda:row", "magnitude"],
        help="methods, each with a pattern of its own after a colon where it differs from --pattern",
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window, for both texts")
    parser.add_argument("--sampling", default="packed", choices=["packed", "wanda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, default=64, help="WikiText-2 windows; 0 for all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    source = args.model or str(fetch())
    model, tokenizer = load_model(source).to(args.device), load_tokenizer(source)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = C4Calibration(args.samples, args.seqlen, args.sampling, args.seed).windows(tokenizer, args.seqlen)
    test = evaluation_windows("wikitext2", tokenizer, args.seqlen, args.max_windows or None)

    results = {"dense": {"perplexity": perplexity(model, test, description="dense")}}
    for entry in args.methods:
        method, _, pattern = entry.partition(":")
        model.load_state_dict(dense)
        report = prune(
            model,
            calibration,
            sparsity=args.sparsity,
            pattern=pattern or args.pattern,
            method=method,
            batch_size=4,
        )
        results[entry] = {
            "perplexity": perplexity(model, test, description=entry),
            "zeros": report.sparsity,
            "mean_relative_error": sum(r.relative_error for r in report.layers) / len(report.layers),
            "solve_seconds": report.solve_seconds,
            "capture_seconds": report.capture_seconds,
        }
        print(json.dumps({entry: results[entry]}), flush=True)

    table = Table("method", "perplexity", "zeros", "mean relative error", "solver s", "capture s")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['perplexity']:.3f}",
            *(f"{row[key]:{form}}" if key in row else "" for key, form in COLUMNS.items()),
        )
    table.title = (
        f"WikiText-2 test, {len(test)} windows of {args.seqlen}; "
        f"C4 calibration {args.samples} × {args.seqlen}, {args.sampling}"
    )
    Console(width=110).print(table)
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


COLUMNS = {"zeros": ".4%", "mean_relative_error": ".5f", "solve_seconds": ".1f", "capture_seconds": ".1f"}

if __name__ == "__main__":
    main()
