"""Draw the figures of docs/how-it-works.md from real layers, which `MAIHT_ORACLE_DIR` holds.

    MAIHT_ORACLE_DIR=... python scripts/draw_layers.py [FOLDER]

Some seconds on a CPU. What was drawn stands in the files' metadata, so that a test can compare it with the code.
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from safetensors.torch import load_file

from maiht_lightning import LayerResult, MAIHTConfig, prune_layer
from maiht_lightning.reporting.formats import method_name

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
LAYERS = ("layers.3.self_attn.k_proj", "layers.12.self_attn.v_proj")
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "maiht")
PATTERNS = ("unstructured", "row", "2:4")
# Every method as it was published.
CONFIG = MAIHTConfig()
# Rows and columns of the part of a layer that is shown.
PART = 32
GREY, BLUE = "#8a8f98", "#3f51b5"


def load_layers(folder: Path) -> dict[str, dict[str, Any]]:
    """The weight W0 (out, in) and the Gram matrix (in, in) of each layer by its name."""
    return {name: load_file(folder / f"{name}.safetensors") for name in LAYERS}


def solve(layer: dict[str, Any], method: str, pattern: str = "") -> LayerResult:
    """Prune a layer to 50 %, Wanda by rows unless a pattern is given."""
    pattern = pattern or ("row" if method == "wanda" else "unstructured")
    return prune_layer(layer["weight"], layer["gram"], sparsity=0.5, pattern=pattern, method=method, config=CONFIG)


def draw_methods(layers: dict[str, dict[str, Any]]) -> tuple[Figure, Any]:
    """A bar a method: the relative error of each layer."""
    errors = {name: {m: float(solve(layer, m).relative_error) for m in METHODS} for name, layer in layers.items()}
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for ax, (name, found) in zip(axes, errors.items(), strict=True):
        colours = [BLUE if method == "maiht" else GREY for method in METHODS]
        bars = ax.barh([method_name(m) for m in METHODS], list(found.values()), color=colours)
        ax.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        ax.set_xlim(0, 1.25 * max(found.values()))
        ax.locator_params(axis="x", nbins=4)
        ax.invert_yaxis()
        ax.set(title=name, xlabel="relative error at 50 %")
    return figure, errors


def draw_objective(layers: dict[str, dict[str, Any]]) -> tuple[Figure, Any]:
    """The objective after each iteration of mAIHT, by its last value."""
    courses = {name: list(solve(layer, "maiht").objective) for name, layer in layers.items()}
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for ax, (name, course) in zip(axes, courses.items(), strict=True):
        ax.plot(range(1, len(course) + 1), [value / course[-1] for value in course], color=BLUE)
        ax.axvline(CONFIG.iterations + 0.5, color=GREY, linestyle=":")
        ax.set(title=name, xlabel="iteration", ylabel="objective by its last value")
        ax.grid(alpha=0.3)
    return figure, courses


def draw_supports(layers: dict[str, dict[str, Any]]) -> tuple[Figure, Any]:
    """The weights that stay in a corner of the first layer, pattern by pattern."""
    layer = layers[LAYERS[0]]
    masks = {pattern: solve(layer, "maiht", pattern).weight[:PART, :PART] != 0 for pattern in PATTERNS}
    figure, axes = plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
    for ax, (pattern, mask) in zip(axes, masks.items(), strict=True):
        ax.imshow(mask, cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        ax.set(title=pattern, xticks=[], yticks=[], xlabel=f"{PART} inputs")
    axes[0].set_ylabel(f"{PART} outputs")
    return figure, {pattern: int(mask.sum()) for pattern, mask in masks.items()}


FIGURES_BY_NAME = {"methods": draw_methods, "objective": draw_objective, "supports": draw_supports}


def main(folder: Path = FIGURES) -> None:
    """Draw all of them."""
    layers = load_layers(Path(os.environ.get("MAIHT_ORACLE_DIR", "../shared/oracle")))
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES_BY_NAME.items():
        figure, drawn = draw(layers)
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"results": json.dumps(drawn)})
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
