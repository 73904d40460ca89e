"""Write the tables and the figure of the documentation from the committed results in `docs/results/`.

    python scripts/render_docs.py

In each of `PAGES` a table stands between `<!-- table NAME -->` and `<!-- end -->`; whatever is between is replaced. A
table whose results are not there says so. Where the results come from is said beside each table.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maiht_lightning.records import StageResult, Stages
from maiht_lightning.reporting.comparison.figure import draw_rows
from maiht_lightning.reporting.comparison.rows import comparison
from maiht_lightning.reporting.comparison.runs import Run
from maiht_lightning.reporting.formats import method_name, perplexity
from maiht_lightning.reporting.summary import Summary

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/methods/index.md")
RESULTS = ROOT / "docs" / "results"
FIGURE = ROOT / "docs" / "results-perplexity.png"
TEXTS = {"wikitext2": "perplexity", "c4": "on C4"}
# `best` without its last step.
BLOCKS = "maiht:best,rescaling_epochs=0"
TASKS = {
    "boolq": "BoolQ",
    "rte": "RTE",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}


def table(headings: list[str], rows: list[list[str]], texts: int) -> str:
    """A Markdown table, whose first columns hold texts and the others numbers."""
    rules = ["---"] * texts + ["---:"] * (len(headings) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rules, *rows])


def named(setting: str) -> str:
    return setting if ":" in setting else f"{100 * float(setting):g} %"


def entry_name(entry: str) -> str:
    """Write a method with its preset, such as `maiht:best`, for a reader."""
    method, _, preset = entry.replace("rescaling_epochs=0", "no factors").partition(":")
    return ", ".join([method_name(method), *filter(None, preset.replace("=", " ").split(","))])


def methods(found: dict[str, Any]) -> str:
    """A row a run: perplexities, accuracies where there are any, and the layers' mean relative error."""
    texts = [text for text in TEXTS if text in found["dense"]["perplexity"]]
    tasks = [task for task in TASKS if task in found["dense"].get("tasks", {})]

    def cells(stage: dict[str, Any]) -> list[str]:
        accuracies = [f"{100 * stage['tasks'][task]['acc']:.1f}" for task in tasks]
        mean = [f"{100 * stage['mean_accuracy']:.1f}"] if tasks else []
        measured = [perplexity(stage["perplexity"][text]) if text in stage["perplexity"] else "" for text in texts]
        return [*measured, *accuracies, *mean]

    measures = [*(TEXTS[text] for text in texts), *(TASKS[task] for task in tasks), *["mean"][: len(tasks)]]
    rows = [["dense", "", *cells(found["dense"]), ""]]
    for run in found["runs"]:
        label = [named(run["setting"]), entry_name(run["method"])]
        rows.append([*label, *cells(run), f"{run['mean_relative_error']:.4f}"])
    return table(["setting", "method", *measures, "relative error"], rows, 2)


def ratios(found: dict[str, Any]) -> str:
    """A row a setting: the best of the published methods there are, and the presets' perplexities by its own.

    Of `best` without its last step, too; presets that were measured at no setting have no column.
    """
    value = {(run["setting"], run["method"]): run["perplexity"]["wikitext2"] for run in found["runs"]}
    entries = list(dict.fromkeys(run["method"] for run in found["runs"]))
    ours = [entry for entry in ("maiht:balanced", BLOCKS, "maiht:best") if entry in entries]
    rows = []
    for setting in dict.fromkeys(run["setting"] for run in found["runs"]):
        measured = {entry: value[setting, entry] for entry in entries if (setting, entry) in value}
        published = {entry: found for entry, found in measured.items() if ":" not in entry or entry == "maiht:paper"}
        best = min(published, key=lambda entry: published[entry])
        ratios = [f"{measured[entry] / published[best]:.3f}" if entry in measured else "" for entry in ours]
        rows.append([named(setting), entry_name(best), perplexity(published[best]), *ratios])
    return table(["setting", "best of the published", "its perplexity", *map(entry_name, ours)], rows, 2)


def ablation(found: dict[str, Any]) -> str:
    """A row a run: its perplexity, and by how much it is that of `paper`."""
    value = {run["method"]: run["perplexity"]["wikitext2"] for run in found["runs"]}
    rows = [
        [entry_name(entry), perplexity(each), f"{each / value['maiht:paper']:.3f}"] for entry, each in value.items()
    ]
    return table(["method", "perplexity", "by `paper`"], rows, 1)


def layer_errors(found: dict[str, Any]) -> str:
    """A row a method: errors by those of mAIHT as published, of the layers set aside, and what they cost."""
    settings = list(dict.fromkeys(mean["setting"] for mean in found["means"]))
    value = {(mean["setting"], mean["method"]): mean["ratio"] for mean in found["means"] if mean["set"] == "set-aside"}
    rows = []
    for entry in dict.fromkeys(method for _, method in value):
        costs = found["costs"].get(entry)
        shown = ["", ""] if costs is None else [str(number or "") for number in costs]
        name = "float64 reference" if entry == "reference" else entry_name(entry)
        rows.append([name, *(f"{value[setting, entry]:.3f}" for setting in settings), *shown])
    return table(["method", *map(named, settings), "products", "factorisations"], rows, 1)


def speed(found: dict[str, Any]) -> str:
    """A row a layer and method: time by that of the bare products."""
    rows = [
        [
            row["layer"],
            f"{row['shape'][0]} × {row['shape'][1]}",
            f"{found['settings']['iterations']} + {found['settings']['refine_iterations']}",
            method_name(row["method"]),
            f"{row['times_bare_products']:.2f}",
            f"{row['relative_error']:.4f}",
        ]
        for row in found["rows"]
    ]
    headings = ["layer", "out × in", "mAIHT's iterations", "method", "time by bare products", "relative error"]
    return table(headings, rows, 4)


def frozen(found: dict[str, Any]) -> str:
    settings, results = found["settings"], found["results"]
    row = [
        settings["model"],
        f"{settings['batch_size']} × {settings['seqlen']}",
        f"{results['frozen_weights']:,}",
        f"{100 * results['share_of_a_step']:.1f}",
    ]
    return table(["model", "tokens a step", "frozen weights", "masking, % of a step"], [row], 1)


def recovery(found: dict[str, Any]) -> str:
    labels = {"text": "loss of the text alone", "distillation": "half of the loss the divergence from the dense model"}
    rows = [
        [labels[name], *(perplexity(run[stage]["wikitext2"]) for stage in ("dense", "pruned", "finetuned"))]
        for name, run in found.items()
    ]
    return table(["", "dense, as fine-tuned", "pruned", "trained on with the zeros frozen"], rows, 1)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "methods": ("smollm2.json", methods),
    "more-text": ("smollm2_64.json", methods),
    "most-text": ("smollm2_128.json", methods),
    "ratios": ("smollm2.json", ratios),
    "most-ratios": ("smollm2_128.json", ratios),
    "ablation": ("ablation.json", ablation),
    "layer-errors": ("layer_error.json", layer_errors),
    "solver-speed": ("solver_speed.json", speed),
    "solver-speed-large": ("solver_speed_large.json", speed),
    "frozen": ("frozen.json", frozen),
    "recovery": ("recovery.json", recovery),
}


def rendered(text: str) -> str:
    """A page with its tables as the results have them."""

    def fill(match: re.Match[str]) -> str:
        file, make = TABLES[match[1]]
        path = RESULTS / file
        content = make(json.loads(path.read_text())) if path.exists() else "*Not measured yet with this version.*"
        return f"<!-- table {match[1]} -->\n\n{content}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def as_runs(found: dict[str, Any]) -> list[Run]:
    """The results as the runs from which they were taken, as far as a figure needs them.

    Of changed presets there is `best` without its last step alone.
    """
    runs = []
    for run in found["runs"]:
        if "," in run["method"] and run["method"] != BLOCKS:
            continue
        stages = Stages({"dense": StageResult.from_json(found["dense"]), "pruned": StageResult(run["perplexity"])})
        summary = Summary(entry_name(run["method"]), run["sparsity"], run["pattern"], run["measured_sparsity"], stages)
        name = Path(f"{run['setting']}-{run['method']}-{run['seed']}")
        runs.append(Run(name, summary, run["mean_relative_error"], {}, (str(run["seed"]),)))
    return runs


def digest(found: dict[str, Any]) -> str:
    """Of what a figure shows; stands in its file, so that it can be seen to belong to the results."""
    shown = [found["dense"]["perplexity"]]
    shown += [[run["setting"], run["method"], run["seed"], run["perplexity"]] for run in found["runs"]]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    if (RESULTS / "smollm2.json").exists():
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        found = json.loads((RESULTS / "smollm2.json").read_text())
        draw_rows(FIGURE, comparison(as_runs(found)).rows)
        note = PngInfo()
        note.add_text("results", digest(found))
        with Image.open(FIGURE) as image:
            image.load()
        image.save(FIGURE, pnginfo=note)


if __name__ == "__main__":
    main()
