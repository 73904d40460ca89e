"""What every command of `maiht` is for, in words: loads nothing, so that help comes at once.

`maiht COMMAND --help` shows the settings that people turn and when; `--help_all` comes from the code, whose defaults
these pages repeat (`tests/command_line/test_help.py` compares them).
"""

import shutil
import textwrap
from dataclasses import dataclass

from ..validation import did_you_mean

RUN_STATUS = (
    "Exit status: 0 done; 1 pruned, but something beside it failed; 2 a setting, a file or the model does not fit; "
    "130, 143 stopped by Ctrl-C or SIGTERM: nothing is lost, and the command that resumes is printed."
)


@dataclass(frozen=True)
class Setting:
    """A setting that people turn.

    Args:
        name: As on the command line, such as `--pruning.sparsity`.
        value: What stands for its value in the help.
        default: What holds when it is left out; empty where it must be given or nothing is done without it.
        text: What it is, and when to turn it.
    """

    name: str
    value: str
    default: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command's help.

    Args:
        line: One line for `maiht --help`.
        purpose: What it does.
        example: A command that works, within 80 columns, with backslashes where a line is continued.
        settings: What people turn, the first things first.
        is_run: Whether it has a Trainer, a configuration file and a run's folder.
        more: What there is to know beside.
        status: What the exit statuses mean.
    """

    line: str
    purpose: str
    example: str
    settings: tuple[Setting, ...]
    is_run: bool = False
    more: str = ""
    status: str = "Exit status: 0 done; 2 a setting, a file or the model does not fit."


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Each text fits beside its setting in 80 columns.
_NAME = Setting("--model.name_or_path", "MODEL", "", "hub name, folder, .gguf file or config.json")
_DATA = Setting("--data", "CLASS", "", "WikiText2DataModule, PythonDocsDataModule")
_PRECISION = Setting("--trainer.precision", "P", "32-true", "bf16-true where memory is short")
_PRUNING = (
    Setting("--pruning.sparsity", "S", "0.5", "fraction of zeros; train on from 0.6"),
    Setting("--pruning.pattern", "P", "unstructured", "2:4 if what serves needs it"),
    Setting("--pruning.method", "M", "maiht", "wanda for speed, others to compare"),
    Setting("--pruning.config", "PRESET", "balanced", "fast; best if time allows; paper"),
    Setting("--pruning.calibration", "CLASS", "C4Calibration", "offline PythonDocsCalibration"),
    Setting("--pruning.batch_size", "N", "1", "windows at once; more while memory lasts"),
    Setting("--pruning.offload", "WHERE", "none", "cpu where the GPU is too small"),
)
_EVALUATION = Setting("--pruning.evaluation.tasks", "LIST", "", "such as '[boolq,arc_easy]'; extra eval")
_OUTPUT = Setting("--output_dir", "FOLDER", "", "the run's folder; given again, it resumes")
_LOGGER = Setting("--trainer.logger", "CLASS", "", "WandbLogger; without a net also .offline true")
_MEASURED = (
    Setting("--trainer.limit_{}_batches", "N", "", "only so many batches, for a quick look"),
    Setting("--data.seqlen", "N", "", "tokens per window; compare at equal lengths"),
    Setting("--data.batch_size", "N", "", "windows per forward pass"),
)
_DTYPE = Setting("--dtype", "D", "auto", "bfloat16 where memory is short; auto: as saved")


def _measured(name: str) -> tuple[Setting, ...]:
    return (
        _NAME,
        _DATA,
        *(Setting(each.name.format(name), each.value, each.default, each.text) for each in _MEASURED),
        _PRECISION,
    )


# In the order in which a person meets them.
COMMANDS: dict[str, Command] = {
    "doctor": Command(
        "What is here, what is missing, and the command that installs it",
        "See whether pruning can work here: versions, devices, memory, caches, network, and what is missing for what.",
        "maiht doctor",
        (Setting("--json", "", "false", "print JSON, for scripts and bug reports"),),
        status="Exit status: 0 pruning can work here; 1 it cannot, and what to do is said. A missing network is no "
        "failure.",
    ),
    "estimate": Command(
        "Memory and time of a run, predicted from the model's config",
        "Predict operations, time and peak memory of a run, and say what to change where it does not fit. Only the "
        "model's config is read.",
        f"maiht estimate --model {MODEL} \\\n    --gpu a100-80gb --train_steps 1000",
        (
            Setting("FILE", "", "", "a run's configuration file; comes first"),
            Setting("--model", "MODEL", "", "hub name, folder, .gguf file or config.json"),
            Setting("--gpu", "NAME", "local", "such as a100-80gb, rtx4090; local is measured"),
            Setting("--train_steps", "N", "0", "training passes; 0 for a run that only prunes"),
            Setting("--train_batch_size", "N", "1", "windows per pass"),
            Setting("--optimizer", "O", "adamw_8bit", "adamw is PyTorch's, with larger moments"),
            Setting("--dtype", "D", "bfloat16", "format of the weights"),
            Setting("--samples", "N", "128", "calibration windows"),
            Setting("--seqlen", "N", "2048", "tokens per window"),
            Setting("--batch_size", "N", "8", "calibration windows at a time"),
            Setting("--method", "M", "maiht", "and --pattern, --sparsity, --config as in a run"),
            Setting("--offload", "WHERE", "none", "cpu or disk, to see what they save"),
            Setting("--output", "FILE", "", "a JSON file for the figures"),
        ),
    ),
    "fit": Command(
        "Fine-tune, prune when training ends, measure; recover if asked to",
        "Fine-tune a causal language model, prune it when training ends, measure it before and after, and save a "
        "folder that from_pretrained loads. With sparse_finetune it is then trained on with its zeros frozen.",
        f"maiht fit --model.name_or_path {MODEL} \\\n"
        "    --data PythonDocsDataModule --data.seqlen 256 --trainer.max_steps 20 \\\n"
        "    --pruning.calibration PythonDocsCalibration \\\n"
        "    --pruning.evaluation.perplexity '[python_docs]'",
        (
            _NAME,
            _DATA,
            Setting("--trainer.max_steps", "N", "", "of the fine-tune; or --trainer.max_epochs"),
            Setting("--model.learning_rate", "R", "2.0e-05", "lower it for instruction models"),
            *_PRUNING,
            Setting("--sparse_finetune.max_epochs", "N", "", "train on with zeros frozen: wins much back"),
            _EVALUATION,
            _PRECISION,
            _LOGGER,
            _OUTPUT,
        ),
        is_run=True,
        status=RUN_STATUS,
    ),
    "prune": Command(
        "Prune without training, and measure before and after",
        "Prune a causal language model without training it, measure it before and after, and save a folder that "
        "from_pretrained loads.",
        f"maiht prune --model.name_or_path {MODEL} \\\n"
        "    --pruning.calibration PythonDocsCalibration \\\n"
        "    --pruning.evaluation.perplexity '[python_docs]'",
        (
            _NAME,
            *_PRUNING,
            _EVALUATION,
            Setting("--pruning.compact", "", "false", "true also saves small files"),
            _PRECISION,
            Setting("--ckpt_path", "FILE", "", "a Lightning checkpoint to prune"),
            _OUTPUT,
        ),
        is_run=True,
        status=RUN_STATUS,
    ),
    "evaluate": Command(
        "Perplexity and zero-shot accuracy of any model, dense or pruned",
        "Measure the perplexity and the zero-shot accuracy of any causal language model, and count its zeros.",
        f"maiht evaluate --model {MODEL} \\\n    --perplexity '[python_docs]' --seqlen 512",
        (
            Setting("--model", "MODEL", "", "hub name, folder or .gguf file, dense or pruned"),
            Setting("--perplexity", "LIST", "wikitext2", "c4, python_docs, or paths of .txt files"),
            Setting("--tasks", "LIST", "", "zero-shot tasks, as '[boolq,arc_easy]'; extra eval"),
            Setting("--seqlen", "N", "", "tokens per window; else the context, at most 2048"),
            Setting("--max_windows", "N", "", "only the first windows of each text, for a quick look"),
            Setting("--limit", "N", "", "only the first documents of each task, for a quick look"),
            Setting("--batch_size", "N", "1", "windows at once; more while memory lasts"),
            _DTYPE,
            Setting("--device", "D", "", "cuda if there is one, else cpu"),
            Setting("--output", "FILE", "", "a JSON file for the figures"),
        ),
    ),
    "report": Command(
        "Finished runs side by side: a page, tables and a figure",
        "Compare finished runs: a page, tables in Markdown and CSV, and a figure. Runs that differ in seeds alone "
        "become a mean and a standard deviation.",
        "maiht report runs/A runs/B",
        (
            Setting("RUN ...", "", "", "folders of finished runs"),
            Setting("--output_dir", "FOLDER", "", "where the report goes; a fresh folder in reports/"),
            Setting("--wandb", "", "false", "true also publishes a W&B Report; extra wandb"),
            Setting("--entity", "NAME", "", "W&B user or team; by default that of WANDB_ENTITY"),
            Setting("--project", "NAME", "", "W&B project; by default that of the runs"),
        ),
    ),
    "export": Command(
        "A pruned model in compact files: a bit per weight, and the rest",
        "Write a pruned model in compact files, which load_compact reads: a bit per weight, and the weights that are "
        "not zero.",
        "maiht export --model runs/NAME/model --output small",
        (
            Setting("--model", "MODEL", "", "hub name or folder of a pruned model"),
            Setting("--output", "FOLDER", "", "new folder for the files"),
            _DTYPE,
        ),
    ),
    "push": Command(
        "A run's model to the Hugging Face hub, with its card",
        "Upload the model that a run has ended with to the Hugging Face hub, with its card: what was pruned, how, and "
        "what was measured.",
        "maiht push runs/NAME USER/NAME",
        (
            Setting("RUN USER/NAME", "", "", "the run's folder, and the repository"),
            Setting("--name", "FOLDER", "", "model_compact for small files; default: the newest"),
            Setting("--private", "BOOL", "true", "whether a repository that is made is private"),
        ),
        more="The token is that of `hf auth login`, or HF_TOKEN.",
    ),
    "validate": Command(
        "Loss and perplexity on the validation windows of a DataModule",
        "Measure loss and perplexity on the validation windows of a DataModule, with Lightning's loop.",
        f"maiht validate --model.name_or_path {MODEL} \\\n    --data PythonDocsDataModule --data.seqlen 256",
        _measured("val"),
        is_run=True,
    ),
    "test": Command(
        "The same on its test windows",
        "Measure loss and perplexity on the test windows of a DataModule, with Lightning's loop.",
        f"maiht test --model.name_or_path {MODEL} \\\n    --data PythonDocsDataModule --data.seqlen 256",
        _measured("test"),
        is_run=True,
    ),
}


def group_help() -> str:
    """`maiht --help`: all commands, a line each, on one screen of 80 columns."""
    lines = [f"  {name:<10}{command.line}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: maiht COMMAND [SETTINGS]",
            "",
            "Fine-tune a causal language model, prune it in one shot with mAIHT, recover it.",
            "",
            *lines,
            "",
            "  maiht COMMAND --help        what it does, an example, the settings people turn",
            "  maiht COMMAND --help_all    every setting",
            "  maiht fit --print_config    every setting as a commented file, for --config",
            "  maiht --version",
            "",
            "Settings come from --config FILE.yaml and from the command line, which wins.",
            "Exit status: 0 done; 1 something beside the pruning failed, or doctor found",
            "that pruning cannot work; 2 a setting, a file or the model does not fit;",
            "130, 143 stopped by Ctrl-C or SIGTERM: nothing finished is lost.",
        ]
    )


def command_help(name: str, columns: int | None = None) -> str:
    """`maiht NAME --help`.

    Args:
        name: Of the command.
        columns: Width; by default the terminal's, between 70 and 100.
    """
    command = COMMANDS[name]
    columns = min(100, max(70, columns or shutil.get_terminal_size().columns))
    heads = [f"  {f'{each.name} {each.value}'.rstrip()}" for each in command.settings]
    indent = max(map(len, heads)) + 2

    def paragraph(text: str) -> str:
        return textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)

    def settings() -> list[str]:
        found = []
        for head, each in zip(heads, command.settings, strict=True):
            text = f"{each.text} [{each.default}]" if each.default else each.text
            found.append(
                textwrap.fill(
                    text,
                    columns,
                    initial_indent=f"{head:<{indent}}",
                    subsequent_indent=" " * indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        return found

    parts = [
        paragraph(command.purpose),
        "Example:\n  " + command.example,
        "Settings that people turn, with what holds otherwise in [brackets]:\n" + "\n".join(settings()),
    ]
    every = f"Every setting: maiht {name} --help_all"
    if command.is_run:
        every += (
            f"\nAs a file:     maiht {name} --print_config > run.yaml\n               maiht {name} --config run.yaml"
        )
    parts += [every, *([paragraph(command.more)] if command.more else []), paragraph(command.status)]
    return "\n\n".join(parts)


def unknown_command(word: str) -> str:
    """The message about a word that is no command."""
    return f"no command {word!r}{did_you_mean(word, COMMANDS)}\nCommands: {', '.join(COMMANDS)}. See maiht --help."
