"""The paper's experiment: methods × sparsities on one model, each calibrated the same way, ending in a report.

Perplexity on WikiText-2 and the seven zero-shot tasks, dense and pruned, nothing fine-tuned. Every pruning is a run in
a folder of its own, `OUTPUT_DIR/SETTING-METHOD-SEED`. Started again with the same `--output_dir`, the script resumes
where it was: finished runs are not repeated, and an unfinished one resumes from its journal. At the end all figures
stand in `OUTPUT_DIR/results.json`, of which `scripts/render_docs.py` makes the tables in the documentation.

A method may have a preset of its settings after a colon, and settings that differ from it after commas.

    python scripts/reproduce_paper.py                             # LLaMA-7B, one 80 GB GPU
    python scripts/reproduce_paper.py --preset smollm2 --tasks    # SmolLM2-135M on a CPU, hours; no tasks
    python scripts/reproduce_paper.py --preset smollm2 --tasks --methods maiht:fast maiht:fast,sublayers=true
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console

from fetch_smollm2 import fetch
from maiht_lightning import C4Calibration, prune
from maiht_lightning.evaluation.evaluation import Evaluation, LoadedEvaluation
from maiht_lightning.evaluation.lm_eval_tasks import PAPER_TASKS
from maiht_lightning.models.loading import load_model, load_tokenizer
from maiht_lightning.records import StageResult, Stages
from maiht_lightning.reporting.comparison.rows import comparison, write_comparison
from maiht_lightning.reporting.comparison.runs import Run, read_run
from maiht_lightning.reporting.environment import environment
from maiht_lightning.reporting.recorder import RunRecorder
from maiht_lightning.reporting.summary import Summary
from maiht_lightning.solvers import MAIHTConfig, PruningSpec, parse_pattern


@dataclass(frozen=True)
class Preset:
    """A model and how much is computed with it."""

    model: Callable[[], str]
    dtype: str
    samples: int
    seqlen: int
    sampling: Literal["wanda", "packed"]
    max_windows: int | None
    limit: int | None
    batch_size: int


PRESETS = {
    "llama7b": Preset(lambda: "huggyllama/llama-7b", "bfloat16", 128, 2048, "wanda", None, None, 4),
    # What two cores do in a few hours: fewer and shorter windows, a part of the test text and of each task.
    "smollm2": Preset(lambda: str(fetch()), "float32", 32, 512, "packed", 40, 50, 4),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="llama7b")
    parser.add_argument("--model", help="hub name, folder or .gguf file (default: the preset's)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["magnitude", "wanda", "sparsegpt", "admm", "maiht:paper", "maiht:balanced", "maiht:best"],
        help="METHOD[:PRESET[,SETTING=VALUE...]]; without a preset as published",
    )
    parser.add_argument("--texts", nargs="+", default=["wikitext2"], help="what perplexity is measured on")
    parser.add_argument("--settings", nargs="+", default=["0.3", "0.5", "0.6", "0.7", "2:4"], help="sparsities and N:M")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--wanda-pattern", default="row", help="Wanda's pattern where others prune unstructured")
    parser.add_argument("--tasks", nargs="*", default=list(PAPER_TASKS))
    parser.add_argument("--limit", type=int, help="documents of each task (default: the preset's; 0 for all)")
    parser.add_argument("--max-windows", type=int, help="windows of WikiText-2 (default: the preset's; 0 for all)")
    parser.add_argument("--samples", type=int, help="calibration windows (default: the preset's)")
    parser.add_argument("--seqlen", type=int, help="tokens per window of both texts (default: the preset's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, help="default: runs/paper-PRESET")
    args = parser.parse_args()
    try:
        for method in args.methods:
            settings_of(method)
        for setting in args.settings:
            pattern_of(setting)
        parse_pattern(args.wanda_pattern, 0.5)
    except ValueError as error:
        parser.error(str(error))
    return args


def settings_of(entry: str) -> tuple[str, MAIHTConfig]:
    """Method and settings of an entry such as `admm`, `maiht:best` or `maiht:best,mu=0.03`."""
    method, _, described = entry.partition(":")
    return method, PruningSpec.parse(method=method, config=described or "paper").config


def pattern_of(setting: str, method: str = "maiht", wanda_pattern: str = "row") -> tuple[str, float]:
    """Pattern and sparsity of a setting such as `0.5` or `2:4`; Wanda compares within rows, as published."""
    if ":" in setting:
        return setting, parse_pattern(setting, 0.5).sparsity
    try:
        sparsity = float(setting)
    except ValueError:
        raise ValueError(
            f"settings are sparsities such as 0.5 or patterns such as 2:4, but found {setting!r}"
        ) from None
    name = wanda_pattern if method == "wanda" else "unstructured"
    return name, parse_pattern(name, sparsity).sparsity


def main() -> None:
    args = parse_arguments()
    preset = PRESETS[args.preset]
    folder = args.output_dir or Path("runs") / f"paper-{args.preset}"
    console = Console()

    def chosen(name: str) -> Any:
        given = getattr(args, name)
        return getattr(preset, name) if given is None else given or None

    source, seqlen = args.model or preset.model(), chosen("seqlen")
    evaluation = Evaluation(
        args.texts, args.tasks, seqlen, chosen("max_windows"), chosen("limit"), batch_size=preset.batch_size
    )
    # What all runs share; a folder with results of something else is not mixed with these.
    common = {
        "model": source,
        "dtype": preset.dtype,
        "calibration": {"samples": chosen("samples"), "seqlen": seqlen, "sampling": preset.sampling},
        "evaluation": asdict(evaluation),
    }
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / "experiment.json"
    if shared.exists() and json.loads(shared.read_text()) != common:
        sys.exit(f"{folder} holds an experiment with other settings ({shared}): choose another --output_dir")
    shared.write_text(json.dumps(common, indent=2) + "\n")

    runs = [(setting, method, seed) for seed in args.seeds for setting in args.settings for method in args.methods]
    folders = [folder / re.sub(r"[^\w.=-]", "_", "-".join(map(str, run))) for run in runs]
    missing = [number for number, run in enumerate(folders) if not (run / "summary.json").exists()]
    if missing or not (folder / "dense.json").exists():
        note_environment(folder)
        tokenizer = load_tokenizer(source)
        model = load_model(source, getattr(torch, preset.dtype)).eval().to(args.device)
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        measurement = evaluation.load(model, tokenizer)
        windows = {
            seed: C4Calibration(chosen("samples"), seqlen, preset.sampling, seed).windows(tokenizer, seqlen)
            for seed in args.seeds
        }
        if not (folder / "dense.json").exists():
            console.rule("dense")
            dense = measurement.measure(model, tokenizer, stage="dense")
            (folder / "dense.json").write_text(json.dumps(dense.to_json(), indent=2) + "\n")
        dense = StageResult.from_json(json.loads((folder / "dense.json").read_text()))
        for number in missing:
            setting, method, seed = runs[number]
            console.rule(f"{number + 1} of {len(runs)}: {method}, {setting}, seed {seed}")
            name, config = settings_of(method)
            pattern, sparsity = pattern_of(setting, name, args.wanda_pattern)
            summary = Summary(name, sparsity, pattern, stages=Stages(dense=dense))
            model.load_state_dict(weights)
            settings = {**common, "seed": seed, "config": asdict(config)}
            one_run(folders[number], model, tokenizer, windows[seed], measurement, summary, settings, preset.batch_size)

    finished = [read_run(run) for run in folders]
    results = {**described(folder), "runs": [figures(*which, run) for which, run in zip(runs, finished, strict=True)]}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = comparison(finished)
    console.print(f"Report: {write_comparison(folder / 'report', table)}")
    console.print(f"Figures: {folder / 'results.json'}")
    print(table.markdown())


def note_environment(folder: Path) -> None:
    """Add this start's versions and machine to `environments.json`: an experiment may go on with others."""
    path = folder / "environments.json"
    known = json.loads(path.read_text()) if path.exists() else []
    if environment() not in known:
        path.write_text(json.dumps([*known, environment()], indent=2) + "\n")


def described(folder: Path) -> dict[str, Any]:
    """What an experiment's runs share: settings, versions, the dense model's figures; no paths of this machine."""
    settings = json.loads((folder / "experiment.json").read_text())
    model = Path(settings.pop("model"))
    return {
        # A name on the hub has a slash in it, too.
        "model": model.name if model.exists() else str(model),
        "settings": settings,
        "environments": json.loads((folder / "environments.json").read_text()),
        "dense": json.loads((folder / "dense.json").read_text()),
    }


def figures(setting: str, method: str, seed: int, run: Run) -> dict[str, Any]:
    """The figures of a finished run."""
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "seconds": run.summary.seconds,
        "pattern": run.summary.pattern,
        "sparsity": run.summary.sparsity,
        "measured_sparsity": run.summary.measured_sparsity,
        "mean_relative_error": run.mean_relative_error,
        **run.summary.stages["pruned"].to_json(),
    }


def one_run(
    folder: Path,
    model: Any,
    tokenizer: Any,
    windows: torch.Tensor,
    measurement: LoadedEvaluation,
    summary: Summary,
    settings: dict[str, Any],
    batch_size: int,
) -> None:
    """Prune, measure and write a run's folder, the model itself excepted."""
    folder.mkdir(parents=True, exist_ok=True)
    pruning: dict[str, Any] = {"method": summary.method, "pattern": summary.pattern, "sparsity": summary.sparsity}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "pruning": pruning}))
    recorder = RunRecorder(folder, summary, {**settings, **pruning})
    report = prune(
        model,
        windows,
        **pruning,
        config=MAIHTConfig(**settings["config"]),
        batch_size=batch_size,
        journal_dir=folder / "journal",
    )
    recorder.pruned(report)
    with recorder.timed("evaluate"):
        found = measurement.measure(model, tokenizer, stage="pruned")
    # With this the run counts as finished: all that a comparison needs is on disk.
    recorder.stage("pruned", found)
    recorder.finish_pruning(report)
    # The blocks' weights have done their duty, and 25 copies of a model would fill the disk.
    for file in (folder / "journal").glob("*.safetensors"):
        file.unlink()


if __name__ == "__main__":
    main()
