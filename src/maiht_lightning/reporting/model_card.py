"""The `README.md` of a saved model: what it is, how it was made, what was measured. The hub calls it a model card."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from ..models.durable import write_text
from ..records import StageResult
from . import formats
from .summary import Summary

CARD = "README.md"
COMPACT = "model_compact"
# USER/NAME, as the hub's repositories are called.
REPO_ID = r"[\w.-]+/[\w.-]+"
# The stage whose figures are those of a saved folder.
STAGE_OF = {"model_dense": "dense", "model": "pruned", "model_finetuned": "finetuned"}
# Data sets by the hub's names, as its leaderboards know them.
_DATASETS = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}

_PAPERS = {
    "maiht": """@inproceedings{wen2025efficient,
  title     = {An Efficient Pruner for Large Language Model with Theoretical Guarantee},
  author    = {Wen, Canhong and Zuo, Yihong and Pan, Wenliang},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  series    = {Proceedings of Machine Learning Research},
  volume    = {267},
  pages     = {66575--66596},
  year      = {2025},
  url       = {https://proceedings.mlr.press/v267/wen25h.html}
}""",
    "sparsegpt": """@inproceedings{frantar2023sparsegpt,
  title     = {{SparseGPT}: Massive Language Models Can Be Accurately Pruned in One-Shot},
  author    = {Frantar, Elias and Alistarh, Dan},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  year      = {2023}
}""",
    "wanda": """@inproceedings{sun2024simple,
  title     = {A Simple and Effective Pruning Approach for Large Language Models},
  author    = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {The Twelfth International Conference on Learning Representations},
  year      = {2024}
}""",
    "admm": """@article{boza2024fast,
  title   = {Fast and Effective Weight Update for Pruned Large Language Models},
  author  = {Bo{\\v{z}}a, Vladim{\\'i}r},
  journal = {Transactions on Machine Learning Research},
  year    = {2024}
}""",
}
_PAPERS |= dict.fromkeys(("aiht", "iht"), _PAPERS["maiht"])


@dataclass(frozen=True)
class BaseModel:
    """The model that a run began with.

    Args:
        name: Its hub name, or the name of its folder or file.
        on_hub: Whether it is a hub name.
        licence: The licence in its own card; None where no card is at hand.
    """

    name: str
    on_hub: bool
    licence: str | None

    @classmethod
    def of(cls, name_or_path: str) -> "BaseModel":
        """Look at a hub name, folder or file, and at the card there or in the hub's cache; nothing is fetched."""
        path = Path(name_or_path).expanduser()
        on_hub = not path.exists() and re.fullmatch(REPO_ID, name_or_path) is not None
        card: Any = try_to_load_from_cache(name_or_path, CARD) if on_hub else path / CARD
        licence = None
        if isinstance(card, str | Path) and Path(card).is_file():
            # Cards are written by hand.
            with suppress(Exception):
                licence = ModelCard.load(card, ignore_metadata_errors=True).data.license
        return cls(name_or_path if on_hub else path.name, on_hub, licence if isinstance(licence, str) else None)


def write_cards(
    folder: Path, summary: Summary, base: str, settings: Mapping[str, Any], versions: Mapping[str, str], command: str
) -> None:
    """Write the cards of all models that a run has saved beside its dense one.

    Args:
        folder: The run's folder.
        summary: What is known of the run.
        base: Hub name or path of the model that the run began with.
        settings: How it was pruned and measured, as the report shows it.
        versions: Versions of libraries, and other things of the machine.
        command: The command that made the run.
    """
    source = BaseModel.of(base)
    saved = [name for name in STAGE_OF if name in summary.saved and name != "model_dense"]
    for name in saved:
        card = model_card(summary, source, settings, versions, command, stage=STAGE_OF[name], name=name)
        write_text(folder / name / CARD, str(card))
    if saved and (folder / COMPACT).is_dir():
        card = model_card(summary, source, settings, versions, command, stage=STAGE_OF[saved[-1]], name=COMPACT)
        write_text(folder / COMPACT / CARD, str(card))


def model_card(
    summary: Summary,
    base: BaseModel,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    command: str,
    *,
    stage: str,
    name: str,
) -> ModelCard:
    """Make the card of one saved model: `stage` has its figures, and `name` is its folder's."""
    method, pattern = formats.method_name(summary.method), summary.pattern
    title = f"{base.name.split('/')[-1]}, {formats.percent(summary.measured_sparsity)} % pruned with {method}"
    measured = summary.stages.get(stage, StageResult())
    texts = [_DATASETS[text] for text in measured.perplexity if text in _DATASETS]
    data = ModelCardData(
        base_model=base.name if base.on_hub else None,
        license=base.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "one-shot-pruning", summary.method, pattern, "maiht-lightning", "pytorch-lightning"],
        datasets=sorted(set(texts)) or None,
        model_name=title,
        eval_results=_results(measured) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_plain(title)}",
        _introduction(summary, base, method, stage),
        "## How to use it",
        _usage(name),
        "## Measured",
        _figures(summary, stage),
        "## How it was made",
        _table(
            ["setting", "value"],
            [
                [key, _without_folders(formats.setting(value))]
                for key, value in formats.flatten(settings).items()
                if not key.startswith("evaluation.")
            ],
        ),
        "```bash\n" + _without_folders(command).replace("```", "") + "\n```",
        _table(["made with", ""], [[key, value] for key, value in versions.items()]),
    ]
    if (paper := _PAPERS.get(summary.method)) is not None:
        parts += ["## Citation", f"```bibtex\n{paper}\n```"]
    return ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=True)


def _introduction(summary: Summary, base: BaseModel, method: str, stage: str) -> str:
    source = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else f"`{_plain(base.name)}`"
    after = ", and fine-tuned with its zeros frozen" if stage == "finetuned" else ""
    licence = (
        f"The base model's licence is `{base.licence}`, and holds for this one."
        if base.licence
        else "The base model's licence holds for this one."
    )
    return (
        f"{source} with {formats.percent(summary.measured_sparsity)} % of the weights in the linear layers of its "
        f"decoder blocks set to zero, pattern `{summary.pattern}`, in one shot by {method} from calibration "
        f"text{after}. Embeddings, norms and the output head are dense. The zeros make files smaller where they are "
        f"stored compactly; they make nothing faster by themselves. {licence}"
    )


def _usage(name: str) -> str:
    if name == COMPACT:
        code = (
            "from maiht_lightning import load_compact\nfrom transformers import AutoTokenizer\n\n"
            'folder = "FOLDER"  # of these files, such as huggingface_hub.snapshot_download("USER/NAME")\n'
            "model, tokenizer = load_compact(folder), AutoTokenizer.from_pretrained(folder)"
        )
        return f"The files hold no zeros, in the format of `maiht-lightning`.\n\n```python\n{code}\n```"
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'name = "USER/NAME"  # this repository or folder\n'
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        'inputs = tokenizer("The capital of France is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    )
    return f"```python\n{code}\n```"


def _figures(summary: Summary, stage: str) -> str:
    """A table with a column for each stage up to this one."""
    stages = {}
    for name, found in summary.stages.in_order().items():
        stages[name] = found
        if name == stage:
            break
    known = summary.stages.__class__(stages)
    rows = [
        [
            f"perplexity, {text}",
            *(
                formats.perplexity(s.perplexity[text]) if text in s.perplexity else formats.DASH
                for s in stages.values()
            ),
        ]
        for text in known.texts
    ]
    rows += [
        [f"{task}, {metric} %", *(formats.score(*s.score(task, metric)) for s in stages.values())]
        for task, metric in known.metrics
    ]
    return _table(["", *stages], rows) if rows else "Nothing was measured."


def _results(measured: StageResult) -> list[EvalResult]:
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS.get(text, text),
            dataset_name=text,
            metric_type="perplexity",
            metric_name=f"perplexity on {text}",
            metric_value=value,
        )
        for text, value in measured.perplexity.items()
    ]
    for task, metrics in measured.tasks.items():
        found += [
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=f"{task} (lm-eval)",
                metric_type="accuracy" if metric == "acc" else metric,
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
            if not metric.endswith("_stderr")
        ]
    return found


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Names from outside as they read, and not as Markdown or HTML."""
    text = text.replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _without_folders(text: str) -> str:
    """Absolute paths by their last part alone: a card is for others."""
    return re.sub(r"(?<![\w./:])~?(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)
