"""A folder for MAIHT_DATA_DIR with texts of some thousand words, and calling scripts as a user does."""

import gzip
import importlib
import json
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = [
    "river",
    "bridge",
    "seven",
    "the",
    "of",
    "a",
    "to",
    "and",
    "letter",
    "moved",
    "under",
    "quiet",
    "engine",
    "while",
]


def prose(words, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


def write_texts(folder):
    """WikiText-2's and C4's files, as `MAIHT_DATA_DIR` is laid out."""
    (folder / "wikitext2").mkdir(parents=True)
    for seed, (split, lines) in enumerate({"train": 60, "validation": 20, "test": 20}.items()):
        table = pyarrow.table({"text": [prose(60, 100 * seed + line) for line in range(lines)]})
        pyarrow.parquet.write_table(table, folder / "wikitext2" / f"{split}.parquet")
    (folder / "c4").mkdir()
    for seed, split in enumerate(("train", "validation")):
        with gzip.open(folder / "c4" / f"{split}.jsonl.gz", "wt") as file:
            for line in range(60):
                file.write(json.dumps({"text": prose(700, 1000 * (seed + 1) + line)}) + "\n")
    return folder


def load_script(name, monkeypatch):
    """A script as a module, with its folder first on the path, as Python has it when the script is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(name)


def run_script(module, monkeypatch, *arguments):
    """Call a script's `main` with arguments of a command line."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()
