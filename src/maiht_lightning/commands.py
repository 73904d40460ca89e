"""The commands of `maiht` that need no Trainer: `evaluate`, `report`, `export`, `push` and `estimate`."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from .command_line.parser import CommandParser
from .command_line.quiet import is_plain
from .evaluation.evaluation import Evaluation
from .models.compact import check_vacant, save_compact
from .models.durable import write_text
from .models.loading import load_model, load_tokenizer
from .models.offload import check_device
from .models.sparsity import count_zeros, measured_sparsity
from .records import Stages
from .reporting.comparison.rows import comparison, write_comparison
from .reporting.comparison.runs import read_run
from .reporting.run.console import stage_table
from .reporting.summary import fresh_run_folder

# `auto`: the checkpoint's own.
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_HELP = "Format of the weights; auto is the checkpoint's own, and float32 for a .gguf file."


def evaluate(args: list[str]) -> None:
    """Measure a model's perplexity and zero-shot accuracy, print a table, and write it if asked to."""
    parser = CommandParser(prog="maiht evaluate", description="Measure any causal language model, dense or pruned.")
    parser.add_argument("--config", action="config", help="File with these settings.")
    parser.add_argument("--model", type=str, required=True, help="Hugging Face hub name, model folder or .gguf file.")
    parser.add_class_arguments(Evaluation)
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help=DTYPE_HELP)
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for the results.")
    settings = parser.parse_args(args)
    evaluation = Evaluation(**{name: settings[name] for name in Evaluation.__dataclass_fields__})
    _check_output(settings.output)
    check_device(settings.device)

    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, DTYPES[settings.dtype])
    # Before the model moves and anything is computed: what is missing shows here.
    measurement = evaluation.load(model, tokenizer)
    counted = _sparsity(model)
    found = measurement.measure(model.to(settings.device), tokenizer, progress=not is_plain())
    if settings.output is not None:
        content = {"model": settings.model, **found.to_json(), **counted}
        write_text(Path(settings.output), json.dumps(content, indent=2) + "\n")
    zeros = f"{counted['sparsity']:.4%} zeros in its linear layers" if counted else "zeros not counted"
    Console().print(stage_table(Stages(measured=found), f"{settings.model}: {zeros}"))


def report(args: list[str]) -> None:
    """Put finished runs side by side: tables in Markdown, CSV and HTML, and a figure."""
    parser = CommandParser(prog="maiht report", description="Compare finished runs: a page, tables and a figure.")
    parser.add_argument("runs", nargs="+", type=str, help="Folders of runs.")
    parser.add_argument(
        "--output_dir", type=str | None, default=None, help="Folder of the report (default: a fresh one in reports/)."
    )
    parser.add_argument("--wandb", type=bool, default=False, help="Also publish a W&B Report; needs the extra wandb.")
    parser.add_argument("--entity", type=str, default=os.environ.get("WANDB_ENTITY", ""), help="W&B user or team.")
    parser.add_argument("--project", type=str | None, default=None, help="W&B project (default: that of the runs).")
    settings = parser.parse_args(args)
    runs = [read_run(folder) for folder in settings.runs]
    table = comparison(runs)
    page = write_comparison(settings.output_dir or fresh_run_folder("reports"), table)
    print(table.markdown())
    print(f"Written: {page}")
    if settings.wandb:
        from .reporting.comparison.wandb_report import publish

        print(f"Published: {publish(runs, table, settings.entity, settings.project)}")


def export(args: list[str]) -> None:
    """Write a pruned model in compact files."""
    parser = CommandParser(prog="maiht export", description="Write a pruned model in compact files.")
    parser.add_argument("--model", type=str, required=True, help="Hugging Face hub name or model folder.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the compact model.")
    parser.add_argument("--dtype", choices=list(DTYPES), default="auto", help=DTYPE_HELP)
    settings = parser.parse_args(args)
    check_vacant(settings.output)
    tokenizer, model = load_tokenizer(settings.model), load_model(settings.model, DTYPES[settings.dtype])
    folder = save_compact(model, settings.output, tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{folder}: {size / 2**20:.1f} MiB instead of {dense / 2**20:.1f} MiB in {dtype}; "
        f"maiht_lightning.load_compact loads it"
    )


def push(args: list[str]) -> None:
    """Upload a run's model to the Hugging Face hub."""
    from .reporting.hub import push as upload

    parser = CommandParser(prog="maiht push", description="Upload a run's model, with its card, to the hub.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("repo_id", type=str, help="USER/NAME on the hub; made if there is none.")
    parser.add_argument(
        "--name",
        type=str | None,
        default=None,
        help="model, model_finetuned, model_compact or model_dense (default: the newest of the first two).",
    )
    parser.add_argument("--private", type=bool, default=True, help="Whether a repository that is made is private.")
    settings = parser.parse_args(args)
    print(upload(Path(settings.run), settings.repo_id, name=settings.name, private=settings.private))


def estimate(args: list[str]) -> None:
    """Predict memory and time of a run, print a table, and say what to change where it will not fit."""
    from .estimate.advice import advise
    from .estimate.devices import SHEETS, find_device
    from .estimate.plan import Job
    from .estimate.plan import estimate as predict
    from .estimate.run_file import read_run_file
    from .estimate.shape import ModelShape
    from .estimate.table import phase_table
    from .estimate.tasks import TASKS

    parser = CommandParser(
        prog="maiht estimate", description="Predict memory and time of a run from a model's config; loads no weights."
    )
    file = args[0] if args and not args[0].startswith("-") else None
    parser.add_argument(
        "--model", type=str, required=file is None, help="Hub name, model folder, .gguf file, or path of a config.json."
    )
    parser.add_argument(
        "--gpu", type=str, default="local", help=f"One of {', '.join(SHEETS)}, or local: this machine, measured."
    )
    parser.add_class_arguments(Job)
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for the results.")
    notes: list[str] = []
    if file is not None:
        model, found_job, notes = read_run_file(file)
        parser.set_defaults(model=model, **found_job)
    settings = parser.parse_args(args if file is None else args[1:])
    _check_output(settings.output)
    job = Job(**{name: parser.instantiate(settings)[name] for name in Job.__dataclass_fields__})
    if settings.gpu != "local":
        # A name is refused before a hub is asked for the model.
        find_device(settings.gpu)
    shape = ModelShape.from_source(settings.model)
    device = find_device(settings.gpu, shape.hidden, max(shape.grams))
    found = predict(shape, job, device)
    advice = advise(shape, job, device, found)
    if settings.output is not None:
        content = {"model": settings.model, "device": asdict(device), "job": asdict(job), **asdict(found)}
        write_text(Path(settings.output), json.dumps({**content, "advice": advice}, indent=2) + "\n")
    Console().print(phase_table(found, f"{settings.model}: {shape.parameters / 1e9:.2f} B parameters on {device.name}"))
    for note in notes if settings.train_steps == 0 else []:
        print(f"Of {file}: {note}.")
    if unknown := [task for task in job.tasks if task not in TASKS]:
        print(f"Not in it: the tasks {', '.join(unknown)}, whose size is not known here.")
    for sentence in advice or [f"All of it fits into the {device.memory / 2**30:.0f} GiB of {device.name}."]:
        print(sentence)


def _sparsity(model: nn.Module) -> dict[str, float]:
    """The fraction of zeros as `sparsity`; empty, and said why, for models whose layers cannot be counted."""
    try:
        return {"sparsity": measured_sparsity(count_zeros(model))}
    except ValueError as error:
        print(f"The zeros are not counted: {error}", file=sys.stderr)
        return {}


def _check_output(path: str | None) -> None:
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise FileNotFoundError(f"output must be a file in an existing folder, but found {path}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "evaluate": evaluate,
    "report": report,
    "export": export,
    "push": push,
    "estimate": estimate,
}
