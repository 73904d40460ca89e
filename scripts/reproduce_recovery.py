"""Prune SmolLM2-135M to 60 % and train it on with its zeros frozen, without and with distillation, in two runs.

    python scripts/reproduce_recovery.py [options of `maiht fit`, such as --sparse_finetune.max_steps 200]

Each run is `maiht fit` with the options below, which the script prints, in the folder `OUTPUT_DIR/NAME`; a finished run
is not repeated. At the end all figures stand in `OUTPUT_DIR/results.json`, of which `scripts/render_docs.py` makes the
table in the documentation.
"""

import os

# Before torch is loaded: OpenMP's threads wait at barriers by spinning, beside other work for whole time slices.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from fetch_smollm2 import fetch
from maiht_lightning.cli import main as maiht
from maiht_lightning.reporting.environment import environment

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "data.init_args.batch_size": 1,
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 20,
    "trainer.limit_val_batches": 0,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_checkpointing": False,
    "trainer.callbacks": "null",
    "trainer.logger": False,
    "pruning.sparsity": 0.6,
    "pruning.calibration.init_args.samples": 32,
    "pruning.calibration.init_args.sampling": "packed",
    "pruning.evaluation.max_windows": 40,
    "sparse_finetune.max_steps": 100,
    "sparse_finetune.learning_rate": 1e-4,
}
RUNS = {"text": 0.0, "distillation": 0.5}


def finished(run: Path) -> bool:
    return (run / "summary.json").exists() and "finetuned" in stages_of(run)


def stages_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["stages"]
    return found


def figures(run: Path, distillation: float) -> dict[str, Any]:
    """A finished run's figures, with the settings that the run itself has written down."""
    summary, config = json.loads((run / "summary.json").read_text()), yaml.safe_load((run / "config.yaml").read_text())
    return {
        "distillation": distillation,
        "settings": {
            "model": Path(config["model"]["name_or_path"]).name,
            "seqlen": config["data"]["init_args"]["seqlen"],
            "batch_size": config["data"]["init_args"]["batch_size"],
            "seed": config["seed_everything"],
            "steps_before": config["trainer"]["max_steps"],
            "learning_rate_before": config["model"]["learning_rate"],
            "sparsity": config["pruning"]["sparsity"],
            "calibration": config["pruning"]["calibration"]["init_args"],
            "evaluation": config["pruning"]["evaluation"],
            **config["sparse_finetune"],
        },
        "measured_sparsity": summary["measured_sparsity"],
        **{stage: found["perplexity"] for stage, found in summary["stages"].items()},
        "environment": json.loads((run / "environment.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recovery"))
    args, given = parser.parse_known_args()
    model = [] if "--model.name_or_path" in given else ["--model.name_or_path", str(fetch())]
    options = [text for name, value in OPTIONS.items() for text in (f"--{name}", str(value).lower())]
    for name, distillation in RUNS.items():
        run = args.output_dir / name
        if finished(run):
            continue
        command = ["fit", "--config", str(ROOT / "configs" / "smollm2_wikitext2.yaml"), *model, *options]
        command += ["--sparse_finetune.distillation", str(distillation), "--output_dir", str(run), *given]
        print(shlex.join(["maiht", *command]), flush=True)
        maiht(command)
        (run / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    results = {name: figures(args.output_dir / name, distillation) for name, distillation in RUNS.items()}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"Figures: {args.output_dir / 'results.json'}")


if __name__ == "__main__":
    main()
