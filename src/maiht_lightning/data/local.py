"""Local copies of the data sets, for machines without internet."""

import os
from pathlib import Path

VARIABLE = "MAIHT_DATA_DIR"


def local_copy(relative: str) -> Path | None:
    """Find the local copy of a data file; None where the Hugging Face hub is to be used.

    Args:
        relative: The file's path in the folder that `MAIHT_DATA_DIR` names, such as `wikitext2/test.parquet`.

    Raises:
        FileNotFoundError: The variable is set, but the folder or the file is not there. There is no falling back on
            the hub: on a cluster without internet that would hang, or fail far from the cause.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    folder = Path(root).expanduser().absolute()
    advice = f"put it there, or unset {VARIABLE} to read from the Hugging Face hub"
    if not folder.is_dir():
        raise FileNotFoundError(f"{VARIABLE} must name a folder, but found none at {folder}: {advice}")
    file = folder / relative
    if not file.is_file():
        raise FileNotFoundError(
            f"{VARIABLE} must name a folder with the file {relative}, but found none at {file}: {advice}"
        )
    return file
