"""Texts by name, from the local copy or the Hugging Face hub."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .local import VARIABLE, local_copy
from .windows import pack_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("wikitext2", "c4", "python_docs")

# One shard of C4 each: all of it is 300 GB, calibration wants some hundred documents.
_C4_SHARDS = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}

# C4's perplexity in papers: the first 1,100 documents of the validation shard, at most 256 windows
# (https://github.com/IST-DASLab/sparsegpt, https://github.com/locuslab/wanda).
_C4_EVALUATION_DOCUMENTS = 1100
_C4_EVALUATION_WINDOWS = 256


def load_texts(name: str, split: str) -> list[str]:
    """All texts of one split of a data set, in order.

    Args:
        name: ``wikitext2`` (one text a line, blank ones included), ``c4`` (one shard, one text a document),
            ``python_docs`` (one text a topic), or the path of a ``.txt`` file (one text).
        split: ``train``, ``validation`` or ``test``, where the data set has it; a text file has no splits.

    Raises:
        ValueError: No such name, or no such split of it.
        FileNotFoundError: ``MAIHT_DATA_DIR`` is set but lacks the file, or the text file is missing.
    """
    return list(iterate_texts(name, split))


def iterate_texts(name: str, split: str) -> Iterator[str]:
    """The texts of :func:`load_texts` one by one: C4 is read no further than it is consumed."""
    if name == "wikitext2":
        return _wikitext2(split)
    if name == "c4":
        return _c4(split)
    if name == "python_docs":
        from .python_docs import python_docs_texts  # here, as it brings Lightning with it

        return iter(python_docs_texts(split))
    if name.endswith(".txt"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no text file at {file.absolute()}")
        return iter([file.read_text(encoding="utf-8")])
    raise ValueError(f"unknown text {name!r}: expected one of {', '.join(NAMES)}, or the path of a .txt file")


def evaluation_windows(
    name: str, tokenizer: "PreTrainedTokenizerBase", seqlen: int, max_windows: int | None = None
) -> Tensor:
    r"""Held-out windows, cut as papers do for perplexity.

    WikiText-2: the test split's lines joined by ``"\n\n"``. C4: the first 1,100 documents of the validation
    shard joined by a space, at most 256 windows. ``python_docs``: the topics held out. Text file: all of it.

    Args:
        name: As for :func:`load_texts`.
        tokenizer: A Hugging Face tokenizer.
        seqlen: Tokens in a window; figures are comparable only at the same length (2048 for LLaMA).
        max_windows: Take only the first so many; None, as papers do, takes all.

    Returns:
        ``(windows, seqlen)``, int64.

    Raises:
        ValueError: Unknown name, a ``max_windows`` below 1, or a text that does not fill a window.
        FileNotFoundError: As for :func:`load_texts`.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows: expected at least 1 or None, found {max_windows}")
    if name == "c4":
        documents = islice(iterate_texts("c4", "validation"), _C4_EVALUATION_DOCUMENTS)
        windows = pack_windows(documents, tokenizer, seqlen, separator=" ")[:_C4_EVALUATION_WINDOWS]
    else:
        windows = pack_windows(iterate_texts(name, "test"), tokenizer, seqlen, separator="\n\n")
    return windows[:max_windows]


def _wikitext2(split: str) -> Iterator[str]:
    _check_split("wikitext2", split, ("train", "validation", "test"))
    local = local_copy(f"wikitext2/{split}.parquet")
    if local is None:
        return iter(_from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
    import pyarrow.parquet  # type: ignore[import-untyped]  # read where it lies: `datasets` would copy it

    return iter(pyarrow.parquet.read_table(local, columns=["text"])["text"].to_pylist())


def _c4(split: str) -> Iterator[str]:
    _check_split("c4", split, tuple(_C4_SHARDS))
    local = local_copy(f"c4/{split}.jsonl.gz")
    if local is None:
        shard = {split: _C4_SHARDS[split]}
        return (row["text"] for row in _from_hub("allenai/c4", data_files=shard, split=split, streaming=True))
    return _jsonl_texts(local)


def _jsonl_texts(file: Path) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _from_hub(path: str, *args: str, **kwargs: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, *args, **kwargs)
    except Exception as error:
        error.add_note(
            f"{path} was asked of the Hugging Face hub. Without internet, set {VARIABLE} to a folder with local copies."
        )
        raise


def _check_split(name: str, split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}: expected one of {', '.join(known)}")
