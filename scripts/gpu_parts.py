"""The parts of `gpu_check.py`: what each of them looks at, on the device that it is given.

A part yields a `Row` as soon as there is one, since it may be ended at any time, and raises `Skipped` where it has
nothing to look at. Where limits stand, they are what is promised of GPUs; with `small` shapes, which rehearse a part on
a CPU, there are none of time and memory.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench_llama7b import bench, make_config, make_model
from bench_precision import SETTINGS, compare
from bench_solvers import random_layer, real_layers
from maiht_lightning.estimate.devices import find_device
from maiht_lightning.estimate.plan import Job, estimate
from maiht_lightning.estimate.shape import ModelShape
from maiht_lightning.solvers import LayerSolver, PruningSpec, resolve_config
from maiht_lightning.solvers.fusing import failures, run_by, unfused

ROOT = Path(__file__).resolve().parents[1]
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\))?(?: +\[ *\d+%\])?$")
# Seconds that capture and solve of the whole of LLaMA-7B's shape may take in `auto`, by a word of the device's name: a
# quarter more than were measured on an H100, and as many as are promised of an A100.
SECONDS = {"H100": 73.0, "A100": 220.0}
# Bytes of the device, with the model on it and with `offload: cpu`.
MEMORY = {"none": 40e9, "cpu": 24e9}
# Of the rate of products in their format, as it was measured on the device: on an H100 the solve had 0.39 of it.
PEAK = 0.35
# By precision: how far relative errors may be from float32's, as a fraction of these, and how much of a mask differ.
# Of random layers more entries are nearly equal than of trained ones.
ERRORS, MASKS = {"fp16x3": 1e-4, "mixed": 3e-3}, {"fp16x3": 2e-3}
# A prediction may be off by so much before a part that was cut to its time is ended.
MARGIN = 0.75


class Skipped(Exception):
    """A part that has nothing to look at here; the message says why."""


@dataclass(frozen=True)
class Row:
    """Something that was looked at.

    Args:
        what: What it is.
        found: What was measured; None where it could not be.
        unit: Of `found`, `predicted` and the limits.
        predicted: What was predicted of it.
        least: The least that it should be.
        most: The most.
        note: What else there is to say.
    """

    what: str
    found: float | None
    unit: str = ""
    predicted: float | None = None
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def fell_short(self) -> bool:
        """Whether it is beyond a limit; NaN always is."""
        if self.found is None:
            return False
        return not (self.least is None or self.found >= self.least) or not (
            self.most is None or self.found <= self.most
        )


@dataclass(frozen=True)
class Setting:
    """Where a part is, and what it may take.

    Args:
        device: The device.
        small: Tiny shapes, to rehearse the parts.
        deadline: When it is ended, as `time.monotonic` counts.
    """

    device: torch.device
    small: bool
    deadline: float

    @property
    def seconds(self) -> float:
        """How long there still is."""
        return self.deadline - time.monotonic()


def tests(setting: Setting) -> Iterator[Row]:
    """The tests marked `gpu`, a row for each."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise Skipped("there are no tests beside the scripts")
    wanted = ["-k", "same_result_twice"] if setting.small else []
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", *wanted, *map(str, files)]
    variables = {**os.environ, "MAIHT_TEST_DEVICE": setting.device.type, "COLUMNS": "300"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seen, last = 0, "pytest said nothing"
    for line in process.stdout:
        last = line.strip() or last
        if match := OUTCOME.match(line.strip()):
            name, outcome, why = match.groups()
            seen += 1
            skipped = outcome == "SKIPPED"
            note = f"skipped: {why}" if skipped else ""
            yield Row(name, None if skipped else float(outcome != "PASSED"), "failures", most=0.0, note=note)
    process.wait()
    if not seen:
        raise RuntimeError(f"no test ran: {last}")


def precision(setting: Setting) -> Iterator[Row]:
    """Errors and masks of every precision beside float32's, on random layers and then on SmolLM2's."""
    device = setting.device
    shapes = [(96, 128)] if setting.small else [(4096, 4096), (1536, 576)]
    yield from _compared("random", {str(shape): random_layer(shape, device.type) for shape in shapes}, device)
    if setting.small:
        return
    published = Path(os.environ.get("MAIHT_ORACLE_DIR", "/nowhere"))
    found = {file.stem: load_file(file) for file in sorted(published.glob("*.safetensors"))}
    if found:
        yield from _compared("published", {name: (t["weight"], t["gram"]) for name, t in found.items()}, device)
    try:
        layers = real_layers(device.type)
    except (RuntimeError, OSError, ImportError) as error:
        yield Row("SmolLM2's layers", None, note=f"skipped: {error}")
    else:
        yield from _compared("SmolLM2", layers, device)


def _compared(kind: str, layers: dict[str, tuple[Tensor, Tensor]], device: torch.device) -> Iterator[Row]:
    # On a CPU products with TF32 are those of float32.
    precisions = ["fp16x3", "mixed", *(["tf32"] if device.type == "cuda" else [])]
    worst = {name: [0.0, 0.0] for name in precisions}
    for weight, gram in layers.values():
        for arguments in SETTINGS.values():
            compared = compare(weight.to(device), gram.to(device), precisions, "paper", "maiht", **arguments)
            for name in precisions:
                error, mask = compared[name]
                worst[name] = [max(worst[name][0], abs(error)), max(worst[name][1], mask)]
    settings = ", ".join(SETTINGS)
    for name, (error, mask) in worst.items():
        note = f"largest of {len(layers)} {kind} layers at {settings}"
        yield Row(f"{kind}, {name}: error / float32's − 1", error, most=ERRORS.get(name), note=note)
        yield Row(f"{kind}, {name}: share of the mask", mask, most=MASKS.get(name), note=note)


def fusing(setting: Setting) -> Iterator[Row]:
    """What the kernels of the solver's passes over memory save on a layer, and what it takes to compile them."""
    shape = (96, 128) if setting.small else (4096, 4096)
    weight, gram = random_layer(shape, setting.device.type)
    for preset in ("paper", "balanced"):
        solver = LayerSolver(gram, PruningSpec.parse(config=preset))
        with run_by(unfused):
            solver.prune(weight)  # the first time is that of libraries, too
            plain = solver.prune(weight)
        first, again = solver.prune(weight), solver.prune(weight)
        if failures:
            raise RuntimeError(f"Triton could not do it: {failures[0]}")
        ratio, error = again.seconds / plain.seconds, again.relative_error / plain.relative_error - 1
        yield Row(f"{preset}: compiling", first.seconds - again.seconds, "s")
        most = None if setting.small else 1.0
        yield Row(f"{preset}: seconds of a layer, fused by not", ratio, most=most, note=str(shape))
        yield Row(f"{preset}: error by that without, − 1", abs(error), most=3e-3)


def llama7b(
    setting: Setting, precision: str, offload: Literal["none", "cpu"] = "none", preset: str = "paper"
) -> Iterator[Row]:
    """LLaMA-7B's shape, phase by phase beside its prediction: as many blocks as there is time for."""
    name = "tiny" if setting.small else "7b"
    config = replace(resolve_config(preset), precision=precision)  # type: ignore[arg-type]
    job = Job(config=config, offload=offload, eval_windows=0)
    if setting.small:
        config = replace(config, iterations=4, refine_iterations=2)
        job = replace(job, config=config, samples=4, seqlen=32, batch_size=2)
    shape = ModelShape.of(make_model(make_config(name), getattr(torch, job.dtype), "meta"), name)
    local = find_device("local", shape.hidden, max(shape.grams))
    whole = sum(phase.seconds for phase in estimate(shape, job, local).phases)
    blocks = min(shape.blocks, int(shape.blocks * MARGIN * setting.seconds / whole))
    if offload != "none":
        blocks = min(blocks, 4)  # with them all that is ever on the device has been there
    if blocks < 1:
        raise Skipped(f"a block is predicted to take {whole / shape.blocks:.0f} s, which is more than there is")
    found = bench(name, blocks, job, setting.device, local)
    # What is promised of time and memory is promised of the published setting.
    limited = not setting.small and preset == "paper"
    said = f"{blocks} of {shape.blocks} blocks"
    yield Row("zeros", found["sparsity"], least=job.sparsity, most=job.sparsity, note=said)
    total = 0.0
    for phase, each in found["phases"].items():
        total += each["seconds"]
        yield Row(phase, each["seconds"], "s", each["predicted_seconds"]["local"], note=said)
        least = PEAK if limited and phase == "solve" and offload == "none" else None
        rate = each["fraction_of_measured_peak"]
        yield Row(f"{phase}: products", rate, "of their measured peak", least=least, note=said)
    if offload == "none":
        most = next((value for word, value in SECONDS.items() if word in found["device"]), None)
        most = most if limited and precision == "auto" else None
        everything = total * shape.blocks / blocks
        yield Row("all phases of all blocks", everything, "s", whole, most=most, note=f"from {said}")
    predicted = found["predicted_peak_bytes"]["local"] / 1e9
    limit = MEMORY[offload] / 1e9 if (limited and blocks == shape.blocks) or (offload != "none" and limited) else None
    yield Row("peak memory", found["peak_bytes"] / 1e9, "GB", predicted, most=limit, note=said)


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Args:
        look: Yields its rows.
        share: Of the time, beside the shares of the others that are still to come, which get what it leaves.
        least: Seconds below which it is not begun.
    """

    look: Callable[[Setting], Iterator[Row]]
    share: float
    least: float = 15.0


# What matters most comes first. Shares are for an H100, on which the whole model in `auto` is predicted to take 76 s.
PARTS = {
    "tests": Part(tests, 16),
    "precision": Part(precision, 10),
    "fusing": Part(fusing, 8),
    "7b auto": Part(partial(llama7b, precision="auto"), 22),
    "7b tf32": Part(partial(llama7b, precision="tf32"), 22),
    "7b auto, balanced": Part(partial(llama7b, precision="auto", preset="balanced"), 22),
    "7b auto, offload cpu": Part(partial(llama7b, precision="auto", offload="cpu"), 8),
    "7b float32": Part(partial(llama7b, precision="float32"), 22),
}
