"""Compare the layer errors of mAIHT's presets and of the other methods on real layers, with what they cost.

The layers are SmolLM2's, with C4 inputs (`MAIHT_DATA_DIR`). Half of them, the even blocks', settings may be chosen on;
the odd blocks' are set aside for the figures that are reported. Beside the package's methods stands a reference of this
script's own, after ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): ADMM in float64 whose penalty grows until the
support no longer moves, then exact weights on it by conjugate gradients. Errors are divided by those of mAIHT as
published; a column is a geometric mean over layers. Products are those of the layer (out, in) with an (in, in) matrix.

    MAIHT_DATA_DIR=... python scripts/bench_accuracy.py --json docs/results/layer_error.json
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from fetch_smollm2 import fetch
from maiht_lightning import C4Calibration, prune_layer
from maiht_lightning.capture.block_inputs import record_inputs
from maiht_lightning.capture.grams import accumulate_grams
from maiht_lightning.models.blocks import evaluation_mode, find_blocks, find_linears, weight_of
from maiht_lightning.models.loading import load_model, load_tokenizer
from maiht_lightning.reporting.environment import environment
from maiht_lightning.solvers import Pattern, parse_pattern, resolve_config, splitting
from maiht_lightning.solvers.problem import relative_error, scale_gram, scale_weight, unscale_weight

CHOSEN_ON = {
    0: ["self_attn.o_proj", "mlp.down_proj"],
    4: ["self_attn.q_proj", "mlp.gate_proj"],
    12: ["self_attn.v_proj", "mlp.down_proj"],
    20: ["self_attn.o_proj", "mlp.up_proj"],
    28: ["self_attn.q_proj", "self_attn.k_proj"],
}
SET_ASIDE = {
    1: ["self_attn.o_proj", "mlp.down_proj"],
    9: ["self_attn.q_proj", "mlp.gate_proj"],
    17: ["self_attn.v_proj", "mlp.down_proj"],
    25: ["self_attn.o_proj", "mlp.up_proj"],
    29: ["self_attn.q_proj", "self_attn.k_proj"],
}
# Ridge, first penalty and rounds of the reference.
REFERENCE_MU, REFERENCE_RHO, REFERENCE_ROUNDS = 0.01, 0.1, 300


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=["maiht:paper", "admm", "sparsegpt", "maiht:fast", "maiht:accurate"]
    )
    parser.add_argument("--settings", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--layers", choices=["chosen-on", "set-aside", "both"], default="both")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--no-reference", action="store_true", help="leave the float64 reference out, which is slow")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def capture(wanted: dict[int, list[str]], samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (out, in) and Gram matrix (in, in) of each layer, the blocks before it dense."""
    source = str(fetch())
    model, tokenizer = load_model(source), load_tokenizer(source)
    windows = C4Calibration(samples, 512, "packed", 0).windows(tokenizer, 512)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    blocks = find_blocks(model).modules
    with evaluation_mode(model), torch.no_grad():
        inputs = record_inputs(model, blocks, windows.split(4))
        for index, block in enumerate(tqdm(blocks[: max(wanted) + 1], desc="Capturing", unit="block")):
            if index in wanted:
                linears = find_linears(block)
                for group in accumulate_grams(block, inputs):
                    for name in set(group.names) & set(wanted[index]):
                        found[f"{index}.{name}"] = weight_of(linears[name]).detach().clone(), group.gram.float()
            inputs.pass_through(block)
    return found


def reference(weight: Tensor, gram: Tensor, pattern: Pattern) -> float:
    """The relative error of ADMM with a growing penalty, run until its support settles, in float64."""
    scaled = scale_gram(gram.double(), torch.float64)
    target, exponent = scale_weight(weight.double(), scaled.norms)
    matrix = scaled.correlation + REFERENCE_MU * torch.eye(len(gram), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    pull, sparse, dual, penalty = target @ matrix, target, torch.zeros_like(target), REFERENCE_RHO
    before: Tensor | None = None
    for _ in range(REFERENCE_ROUNDS):
        for _ in range(3):
            point = ((pull - dual + penalty * sparse) @ vectors / (values + penalty)) @ vectors.T
            mask = pattern.mask((point + dual / penalty).abs())
            sparse = (point + dual / penalty) * mask
            dual = dual + penalty * (point - sparse)
        moved = 1.0 if before is None else float((mask ^ before).sum()) / float(mask.sum())
        if moved == 0:
            break
        penalty *= 1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1
        before = mask
    # Conjugate gradients on the support, all rows at once.
    residual = -((sparse - target) @ matrix) * mask
    direction, square = residual, residual.square().sum(1, keepdim=True)
    for _ in range(200):
        image = (direction @ matrix) * mask
        length = square / (direction * image).sum(1, keepdim=True).clamp_min(1e-300)
        sparse, residual = sparse + length * direction, residual - length * image
        after = residual.square().sum(1, keepdim=True)
        direction, square = residual + after / square.clamp_min(1e-300) * direction, after
    return relative_error(weight.double(), unscale_weight(sparse, exponent, scaled.norms), scaled)


def cost(entry: str) -> tuple[int, int]:
    """Products and factorisations of a method on one layer; 0 where it has other costs."""
    method, _, preset = entry.partition(":")
    if method != "maiht":
        return {"admm": (21, 1)}.get(method, (0, 1))
    config = resolve_config(preset)
    if config.candidates == "gradient":
        return 2 * config.iterations + config.refine_iterations, 0
    return splitting.products(config), splitting.levels(config.iterations)


def main() -> None:
    args = parse_arguments()
    sets = {"chosen-on": CHOSEN_ON, "set-aside": SET_ASIDE}
    wanted = {k: v for name, part in sets.items() if args.layers in (name, "both") for k, v in part.items()}
    layers = capture(wanted, args.samples)
    rows: list[dict[str, Any]] = []
    for setting in args.settings:
        pattern = parse_pattern(setting, 0.5) if ":" in setting else parse_pattern("unstructured", float(setting))
        for name, (weight, gram) in tqdm(layers.items(), desc=setting, unit="layer"):
            part = "set-aside" if int(name.split(".")[0]) in SET_ASIDE else "chosen-on"
            errors = {}
            for entry in args.methods:
                method, _, preset = entry.partition(":")
                result = prune_layer(
                    weight,
                    gram,
                    sparsity=pattern.sparsity,
                    pattern=pattern.name,
                    method=method,
                    config=preset or "paper",
                )
                errors[entry] = result.relative_error
            if not args.no_reference:
                errors["reference"] = reference(weight, gram, pattern)
            rows.append({"setting": setting, "layer": name, "set": part, "errors": errors})
    means = summarise(rows)
    table = Table("setting", "layers", "method", "error by paper's", "products", "factorisations")
    for row in means:
        products, factorisations = ("", "") if row["method"] == "reference" else map(str, cost(row["method"]))
        table.add_row(row["setting"], row["set"], row["method"], f"{row['ratio']:.3f}", products, factorisations)
    Console(width=110).print(table)
    if args.json:
        costs = {entry: cost(entry) for entry in args.methods}
        found = {"samples": args.samples, "costs": costs, "environment": environment(), "means": means, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means of the errors by those of mAIHT as published, by setting, set of layers and method."""
    means = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for part in dict.fromkeys(row["set"] for row in rows):
            chosen = [row["errors"] for row in rows if (row["setting"], row["set"]) == (setting, part)]
            for entry in chosen[0]:
                logs = [log(errors[entry] / errors["maiht:paper"]) for errors in chosen]
                means.append({"setting": setting, "set": part, "method": entry, "ratio": exp(sum(logs) / len(logs))})
    return means


if __name__ == "__main__":
    main()
