"""Compare `maiht estimate`'s prediction with what the phases of a small run take here: memory, and seconds.

Fine-tuning, pruning and evaluation of SmolLM2's first blocks in float32 on the CPU, each beside its prediction for
this machine. Seconds depend on what else the machine does, so look at them while it is idle. Only Linux says how much
memory a phase took.

    python scripts/check_estimate.py
    python scripts/check_estimate.py --blocks 30 --json check.json
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fetch_smollm2 import fetch
from maiht_lightning.estimate.devices import find_device
from maiht_lightning.estimate.plan import Job, estimate
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.evaluation.perplexity import perplexity
from maiht_lightning.models.loading import load_model
from maiht_lightning.pruning.pruner import prune
from maiht_lightning.reporting.formats import duration, memory
from maiht_lightning.solvers import MAIHTConfig

CONFIG = MAIHTConfig(iterations=4, refine_iterations=2)
# Windows and steps of each phase.
COUNT = 2
JOB = Job(
    dtype="float32",
    samples=COUNT,
    seqlen=512,
    batch_size=1,
    config=CONFIG,
    train_steps=COUNT,
    optimizer="adamw",
    gradient_checkpointing=False,
    train_batch_size=1,
    eval_windows=COUNT,
)


def shorten(source: str, blocks: int, folder: str) -> None:
    """Save a model with its first blocks only."""
    model = load_model(source)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:blocks], blocks
    model.save_pretrained(folder)


def predict(source: str) -> dict[str, tuple[float, float]]:
    """Bytes and seconds by phase; capture and solve are one, as they are measured."""
    shape = ModelShape.from_source(source)
    found = estimate(shape, JOB, find_device("local", shape.hidden, max(shape.grams)))
    phases = {phase.name: (phase.device_bytes, phase.seconds) for phase in found.phases}
    capture, solve = phases.pop("capture"), phases.pop("solve")
    return {**phases, "prune": (max(capture[0], solve[0]), capture[1] + solve[1])}


def measure(source: str) -> dict[str, tuple[float, float]]:
    """Bytes of this process at most, and seconds, by phase."""
    model = load_model(source)
    windows = torch.randint(0, 49152, (2 * COUNT, JOB.seqlen), generator=torch.Generator().manual_seed(0))
    found: dict[str, tuple[float, float]] = {}

    def measured(name: str, work: Callable[[], object]) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        lines = Path("/proc/self/status").read_text().splitlines()
        found[name] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), seconds

    def train() -> None:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6)
        for tokens in windows[:COUNT].split(1):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def evaluate() -> None:  # as often as before and after a pruning
        for _ in range(2):
            perplexity(model, windows[:COUNT], progress=False)

    perplexity(model, windows[:1], progress=False)  # what is slow only once
    measured("evaluate", evaluate)
    measured("prune", lambda: prune(model, windows[:COUNT], config=CONFIG, progress=False))
    measured("finetune", train)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2, or another LLaMA; by default it is fetched")
    parser.add_argument("--blocks", type=int, default=12, help="of SmolLM2's 30")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what the allocator keeps of the whole model would count as this one's base.
        shortening = get_context("spawn").Process(
            target=shorten, args=(options.model or str(fetch()), options.blocks, folder)
        )
        shortening.start()
        shortening.join()
        if shortening.exitcode:
            sys.exit("the model could not be prepared (see above)")
        predicted = predict(folder)
        found = measure(folder)

    table = Table("phase", title=f"SmolLM2, {options.blocks} blocks")
    for quantity in ("memory", "seconds"):
        for heading in (f"{quantity} predicted", "measured", "ratio"):
            table.add_column(heading, justify="right")
    for name, measured in found.items():
        row = []
        for shown, expected, value in zip((memory, duration), predicted[name], measured, strict=True):
            row += [shown(expected), shown(value), f"{value / expected:.2f}"]
        table.add_row(name, *row)
    Console(width=120).print(table)
    if options.json is not None:
        kinds = {"predicted": predicted, "measured": found}
        result = {
            kind: {name: {"bytes": values[0], "seconds": values[1]} for name, values in phases.items()}
            for kind, phases in kinds.items()
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
