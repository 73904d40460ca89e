"""Texts by name: from the local copy, the Hugging Face hub, a text file, or Python itself."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..validation import did_you_mean
from .local import VARIABLE, local_copy

NAMES = ("wikitext2", "c4", "python_docs")

# One shard of C4 per split: all of it is 300 GB, and calibration wants some hundred documents.
_C4_SHARDS = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}

# Topics of the Python reference that are not for training. Whole topics are chosen by name, so that the splits stay
# nearly the same from one Python to the next. Each split has long and short topics, prose and grammar.
_TOPICS = {
    "heldout": ("calls", "execmodel", "objects", "strings", "types"),
    "calibration": ("comparisons", "debugger", "formatstrings", "import", "typesseq"),
}
_ALIASES = {"validation": "heldout", "test": "heldout"}

# Shorter paragraphs ("For example:") may stand in several topics without giving anything away.
_SHORT = 80  # characters


def load_texts(name: str, split: str) -> list[str]:
    """Read all texts of one split of a data set, in order.

    Args:
        name: `wikitext2` (one text per line, blank ones included), `c4` (one shard, one text per document),
            `python_docs` (one text per topic), or the path of a `.txt` file (one text).
        split: `train`, `validation` or `test`, where the data set has it; a text file has no splits.

    Raises:
        ValueError: There is no such name, or no such split of it.
            Or a file is damaged or no text; the message names it.
        FileNotFoundError: `MAIHT_DATA_DIR` is set but lacks the file, or the text file is missing.
    """
    return list(iterate_texts(name, split))


def iterate_texts(name: str, split: str) -> Iterator[str]:
    """Read the texts of `load_texts` one by one: C4 is read no further than it is consumed."""
    if name == "wikitext2":
        return _wikitext2(split)
    if name == "c4":
        return _c4(split)
    if name == "python_docs":
        return iter(python_docs_texts(split))
    if name.endswith(".txt"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"text {name!r} must be a file, but found none at {file.absolute()}")
        with _readable(file):
            return iter([file.read_text(encoding="utf-8")])
    asked = did_you_mean(name, NAMES)
    raise ValueError(f"text must be one of {', '.join(NAMES)}, or the path of a .txt file, but found {name!r}{asked}")


def _wikitext2(split: str) -> Iterator[str]:
    _check_split("wikitext2", split, ("train", "validation", "test"))
    local = local_copy(f"wikitext2/{split}.parquet")
    if local is None:
        return iter(_from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
    # pyarrow reads the file where it lies: `datasets` would copy it into its cache.
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _readable(local):
        return iter(pyarrow.parquet.read_table(local, columns=["text"])["text"].to_pylist())


def _c4(split: str) -> Iterator[str]:
    _check_split("c4", split, tuple(_C4_SHARDS))
    local = local_copy(f"c4/{split}.jsonl.gz")
    if local is None:
        shard = {split: _C4_SHARDS[split]}
        return (row["text"] for row in _from_hub("allenai/c4", data_files=shard, split=split, streaming=True))
    return _jsonl_texts(local)


def _jsonl_texts(file: Path) -> Iterator[str]:
    with _readable(file), gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Name the file in the errors of damaged ones, and of those that hold no text."""
    try:
        yield
    # Those of pyarrow and of the encoding are a ValueError, those of gzip all of the others.
    except (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} must hold text in UTF-8, whole, but cannot be read: {error!r}: replace it") from error


def _from_hub(path: str, *args: str, **kwargs: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, *args, **kwargs)
    except Exception as error:
        error.add_note(
            f"{path} was asked of the Hugging Face hub. Without internet, set {VARIABLE} to a folder with local copies."
        )
        raise


def python_docs_texts(split: str) -> list[str]:
    """Read one split of the language reference behind `help()`, which every Python carries as `pydoc_data.topics`.

    It is about 90 thousand tokens of technical English in all, and needs no network. No topic is in two splits. Topics
    quote each other at length, so no paragraph is in two splits or twice in one either, apart from the very short; a
    topic that loses half its text this way is left out.

    Args:
        split: `train` (the largest), `calibration` or `heldout`; `validation` and `test` are the held-out text too.

    Returns:
        The topics of the split, one text each.

    Raises:
        ValueError: There is no such split.
    """
    splits = _python_docs_splits()
    _check_split("python_docs", split, (*splits, *_ALIASES))
    return list(splits[_ALIASES.get(split, split)])


@cache
def _python_docs_splits() -> dict[str, tuple[str, ...]]:
    from pydoc_data.topics import topics

    chosen = {name for names in _TOPICS.values() for name in names}
    members = {
        **{split: [name for name in names if name in topics] for split, names in _TOPICS.items()},
        "train": [name for name in topics if name not in chosen],
    }
    seen: set[str] = set()
    # Held-out text claims its paragraphs first, then calibration. The longest topics go first, since it is these that
    # quote the short ones.
    splits = {}
    for split, names in members.items():
        ordered = sorted(names, key=lambda name: (-len(topics[name]), name))
        rests = ((name, _unseen_paragraphs(topics[name], seen)) for name in ordered)
        splits[split] = tuple(rest for name, rest in rests if 2 * len(rest) >= len(topics[name]))
    return splits


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """Leave out the paragraphs in `seen`, whatever their layout, and add the others to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) >= _SHORT:
            if words in seen:
                continue
            seen.add(words)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _check_split(name: str, split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise ValueError(f"split of {name} must be one of {', '.join(known)}, but found {split!r}")
