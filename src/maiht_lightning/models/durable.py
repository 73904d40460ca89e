"""Files that outlast a crash: written beside their place, brought to the disk, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..interrupts import interrupts

# What torch's writer says where a file cannot be written to the end; it raises no OSError.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or folder beside its place, bring it to the disk, and give it its name.

    A signal to stop waits until that is done. What cannot be written leaves nothing behind, and whatever has the name
    as it was.

    Args:
        path: The file or folder; folders above it are made.

    Yields:
        `NAME.partial` in the same folder, which does not exist: where to write.

    Raises:
        OSError: The disk is full or cannot be written to; the message names `path` and says what to do.
    """
    partial = path.with_name(f"{path.name}.partial")
    with interrupts.held(), naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        try:
            yield partial
            put_in_place(partial, path)
        except Exception:
            # On a full disk there is to be room for what is written next, such as what has failed.
            remove(partial)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what a disk has to say inside into an `OSError` that names what was written, and says what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _TORCH_WRITER):
            raise
        raise OSError(
            f"{path} could not be written: {error}. What was finished before is kept: see to it that the disk has room "
            f"and can be written to, then start the same again"
        ) from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it; nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for folders.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, path: Path) -> Path:
    """Bring a finished file or folder to the disk and give it its name; whatever had that name is replaced.

    After a crash, there is the old one or the new one, each of them whole. A folder cannot be renamed over another one:
    the old one is `NAME.replaced` for a moment, and stays that if the crash comes just then.

    Args:
        partial: Under the name under which it was written, in the same folder as `path`.
        path: Under the name that it shall have.

    Returns:
        `path`.
    """
    for folder, _, files in os.walk(partial):
        for name in [*files, "."]:
            sync(Path(folder, name))
    old = path.with_name(f"{path.name}.replaced")
    if partial.is_dir() and path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    elif not partial.is_dir():
        sync(partial)
    partial.replace(path)
    sync(path.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)
    return path
