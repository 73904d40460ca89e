"""Compare what each precision makes of real layers with what float32 makes of them: errors and masks.

The layers are 12 of SmolLM2 with C4 inputs (`MAIHT_DATA_DIR`), and the two with published answers where
`MAIHT_ORACLE_DIR` has them. Half-precision products are emulated on a CPU, with the numbers that a GPU multiplies; only
the order of its sums is another, and the bits that tensor cores cut off there. Every result is appended to a file at
once: the same command goes on where it was stopped.

    MAIHT_DATA_DIR=... MAIHT_ORACLE_DIR=... python scripts/bench_precision.py --output runs/precision
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from bench_accuracy import capture
from maiht_lightning import prune_layer
from maiht_lightning.solvers import resolve_config

# Attention's layers are many, and small enough for an emulation; of the MLP's there is one of each shape.
LAYERS = {
    0: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"],
    10: ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"],
    20: ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    29: ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"],
}
SETTINGS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "70 %": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/precision"), help="folder of layers and results")
    parser.add_argument("--presets", nargs="+", default=["paper"])
    parser.add_argument("--precisions", nargs="+", default=["fp16x3", "mixed"])
    parser.add_argument("--method", default="maiht")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--most", type=int, help="leave out layers with more weights")
    return parser.parse_args()


def find_layers(folder: Path, samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight (out, in) and Gram matrix (in, in) by name, small layers first; captured once and kept in the folder."""
    path = folder / f"layers_{samples}.safetensors"
    if not path.exists():
        found = capture(LAYERS, samples)
        weights = {f"{name}.weight": weight for name, (weight, _) in found.items()}
        # Layers with the same input share a Gram matrix, which a safetensors file would refuse.
        save_file(weights | {f"{name}.gram": gram.clone() for name, (_, gram) in found.items()}, path)
    tensors = load_file(path)
    names = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    layers = {name: (tensors[f"{name}.weight"], tensors[f"{name}.gram"]) for name in names}
    for file in sorted(Path(os.environ.get("MAIHT_ORACLE_DIR", "/nowhere")).glob("*.safetensors")):
        loaded = load_file(file)
        layers[f"{file.stem} (published)"] = loaded["weight"], loaded["gram"]
    return dict(sorted(layers.items(), key=lambda layer: layer[1][0].numel() * len(layer[1][1])))


def compare(
    weight: Tensor, gram: Tensor, wanted: list[str], preset: str, method: str, **setting: Any
) -> dict[str, Any]:
    """By precision the error of a layer (out, in) by float32's, less 1, and the share of the mask that differs."""
    config = resolve_config(preset)

    def solve(precision: str) -> tuple[float, Tensor]:
        chosen = replace(config, precision=precision)  # type: ignore[arg-type]
        found = prune_layer(weight, gram, method=method, config=chosen, **setting)
        return found.relative_error, found.mask

    error, mask = solve("float32")
    others = {precision: solve(precision) for precision in wanted}
    return {
        "float32": error,
        **{name: [found / error - 1, float((other != mask).float().mean())] for name, (found, other) in others.items()},
    }


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / f"results_{args.method}_{args.samples}.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    layers = find_layers(args.output, args.samples)
    for preset in args.presets:
        for name, (weight, gram) in tqdm(layers.items(), desc=preset, unit="layer"):
            for setting, arguments in SETTINGS.items():
                key = {"preset": preset, "layer": name, "shape": list(weight.shape), "setting": setting}
                known = {p for row in rows if row.items() >= key.items() for p in row}
                wanted = [precision for precision in args.precisions if precision not in known]
                if wanted and not (args.most and weight.numel() > args.most):
                    rows.append(key | compare(weight, gram, wanted, preset, args.method, **arguments))
                    with results.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the largest and the mean difference by preset, setting and precision."""
    table = Table("preset", "setting", "precision")
    for heading in ("layers", "largest", "mean", "masks differ, most", "mean"):
        table.add_column(heading, justify="right")
    precisions = dict.fromkeys(name for row in rows for name in row if isinstance(row[name], list) and name != "shape")
    for preset in dict.fromkeys(row["preset"] for row in rows):
        for setting in SETTINGS:
            for name in precisions:
                chosen = [r[name] for r in rows if name in r and (r["preset"], r["setting"]) == (preset, setting)]
                if chosen:
                    errors, masks = torch.tensor(chosen, dtype=torch.float64).unbind(1)
                    largest = errors[errors.abs().argmax()]
                    cells = [f"{largest:+.1e}", f"{errors.mean():+.1e}", f"{masks.max():.1e}", f"{masks.mean():.1e}"]
                    table.add_row(preset, setting, name, str(len(chosen)), *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
