"""`compact.json`: what the files of a compact model hold, and how to know that they still do.

docs/compact_format.md describes the format for those who read it without this package.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

INDEX = "compact.json"
FORMAT = "maiht-compact"
VERSION = 3
# What versions that are read call their checksums; version 1 has none.
_CHECKSUMS = {2: "crc32", VERSION: "xxh3"}
_DIGITS = {"crc32": 8, "xxh3": 16}
# More than any model has, and few enough that sizes computed from them stay small numbers.
MOST_WEIGHTS = 2**48


class CompactFileError(ValueError):
    """A file of a compact model is damaged, missing or another model's; the message names it, and the tensor in it."""


@dataclass(frozen=True)
class StoredTensor:
    """How a compact model holds one of the model's tensors.

    Args:
        name: Its name in the model's state dict.
        file: Name of the safetensors file in the folder.
        dtype: Its dtype.
        shape: Its shape, unpacked.
        checksums: By name in the file: of `NAME.mask` and `NAME.values` if it is packed, else of `NAME`. XXH3, CRC-32
            in files of version 2, None in files of version 1.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksums: Mapping[str, str | None]

    @property
    def packed(self) -> bool:
        """Whether it is stored as bits and values."""
        return self.name not in self.checksums


@dataclass(frozen=True)
class CompactIndex:
    """What a compact model's folder holds.

    Args:
        dtype: The model's.
        tensors: All tensors that are stored.
        files: Checksums of other files that make the model, such as `config.json`, by name.
        version: Of the format. Files of version 1 have no checksums.
    """

    dtype: torch.dtype
    tensors: list[StoredTensor]
    files: Mapping[str, str]
    version: int = VERSION

    def by_file(self) -> dict[str, list[StoredTensor]]:
        """The tensors of each safetensors file."""
        found: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.file, []).append(tensor)
        return found

    def write(self, folder: Path) -> None:
        """Write `compact.json` into a folder."""
        tensors = {
            stored.name: {
                "file": stored.file,
                "dtype": _dtype_name(stored.dtype),
                "shape": list(stored.shape),
                _CHECKSUMS[VERSION]: stored.checksums,
            }
            for stored in self.tensors
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": _dtype_name(self.dtype),
            "files": self.files,
            "tensors": tensors,
        }
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")


def read_index(folder: Path) -> CompactIndex:
    """Read `compact.json`, of this version or an older one.

    Raises:
        CompactFileError: It is missing, damaged or of a newer version.
    """
    path = folder / INDEX
    if not path.exists():
        raise CompactFileError(f"{folder} is no compact model: it has no {INDEX}")
    try:
        found = json.loads(path.read_bytes())
        kind, version = found["format"], found["version"]
        if kind == FORMAT and version == 1:
            return _first_version(folder, found)
        if kind == FORMAT and version in _CHECKSUMS:
            checksums = _CHECKSUMS[version]
            files = {_file_name(name): _checksum(value, checksums) for name, value in found["files"].items()}
            tensors = [_stored(name, tensor, checksums) for name, tensor in found["tensors"].items()]
            return CompactIndex(_dtype(found["dtype"]), tensors, files, version)
    except CompactFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"it does not describe a compact model ({error!r})") from error
    raise CompactFileError(
        f"{path} must be of format {FORMAT}, version {VERSION} or older, but found {kind!r}, version {version!r}: a "
        f"newer maiht-lightning may read it"
    )


def damaged(path: Path, what: str) -> CompactFileError:
    """The error that says what is wrong with a file of a compact model."""
    return CompactFileError(f"{path} is damaged: {what}. Copy or export the model again")


def _first_version(folder: Path, found: Any) -> CompactIndex:
    """Version 1 names the files and the shapes of packed weights; all else is in the files' headers."""
    from safetensors import SafetensorError, safe_open

    tensors: list[StoredTensor] = []
    shapes = {name: _shape(shape) for name, shape in found["shapes"].items()}
    for file in map(_file_name, found["files"]):
        path = folder / file
        if not path.exists():
            raise CompactFileError(f"{folder} is damaged: {file} is missing")
        try:
            with safe_open(path, framework="pt") as handle:
                names: Iterable[str] = handle.keys()
                for name in names:
                    layer, _, part = name.rpartition(".")
                    if layer in shapes and part in ("mask", "values"):
                        if part == "values":
                            parts = dict.fromkeys((f"{layer}.mask", name))
                            dtype = handle.get_tensor(name).dtype
                            tensors.append(StoredTensor(layer, file, dtype, shapes[layer], parts))
                    else:
                        tensor = handle.get_tensor(name)
                        tensors.append(StoredTensor(name, file, tensor.dtype, tuple(tensor.shape), {name: None}))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise damaged(path, str(error)) from error
    return CompactIndex(_dtype(found["dtype"]), tensors, {}, version=1)


def _stored(name: str, found: Any, kind: str) -> StoredTensor:
    file, shape = _file_name(found["file"]), _shape(found["shape"])
    checksums = {part: _checksum(value, kind) for part, value in found[kind].items()}
    if checksums.keys() not in ({name}, {f"{name}.mask", f"{name}.values"}):
        raise ValueError(f"{name} is stored as {', '.join(checksums) or 'nothing'}")
    return StoredTensor(name, file, _dtype(found["dtype"]), shape, checksums)


def _file_name(name: Any) -> str:
    # Files are in the folder itself: a name that leads elsewhere is not one that was written here.
    if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
        raise ValueError(f"{name!r} is no file's name")
    return name


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in sizes) or prod(sizes) > MOST_WEIGHTS:
        raise ValueError(f"{sizes!r} is no tensor's shape")
    return tuple(sizes)


def _checksum(value: Any, kind: str) -> str:
    if not isinstance(value, str) or len(value) != _DIGITS[kind]:
        raise ValueError(f"{value!r} is no {kind}")
    return value


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
