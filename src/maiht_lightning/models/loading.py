"""Loading a causal language model and its tokenizer from wherever they are."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .blocks import find_blocks
from .compact import load_compact
from .compact_index import INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Python files beside a model's weights are never run. Left open, transformers would ask whether they may be.
NO_CODE = {"trust_remote_code": False}
# A folder with a model or a tokenizer has one of these.
OF_A_MODEL = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json")


def check_source(name_or_path: str) -> None:
    """Raise `FileNotFoundError` if the text can only be a path and no model is there; nothing is loaded.

    A text without a slash at its start and with at most one inside may be a name on the Hugging Face hub.
    """
    path = Path(name_or_path).expanduser()
    looks_local = path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1
    if path.is_dir():
        absent = not any((path / name).exists() for name in OF_A_MODEL)
    else:
        absent = (looks_local or path.suffix in (".gguf", ".json")) and not path.exists()
    if absent:
        # Of all folders without a model, a run's own is the one that is given most easily.
        inner = f". The model of this run is in {path / 'model'}" if (path / "model").is_dir() else ""
        raise FileNotFoundError(
            f"no model at {path}: expected a Hugging Face folder, a .gguf file, a config.json, or a hub name{inner}"
        )


def load_model(
    name_or_path: str, dtype: torch.dtype | None = torch.float32, *, blocks_on_disk: bool = False
) -> "PreTrainedModel":
    """Load a causal language model.

    Args:
        name_or_path: A Hugging Face hub name; a local folder, also a compact one; a `.gguf` file, whose weights
            are dequantised; or the path of a `config.json`, for random weights from torch's global generator.
        dtype: Floating-point format of the weights. None: that of the checkpoint, and float32 for a `.gguf` file or a
            config that names none.
        blocks_on_disk: Leave the decoder blocks in their safetensors files, from which they are read when they are
            needed, so that the model may be larger than the memory. Needs Accelerate.

    Raises:
        ValueError: The blocks of such a file cannot be left on disk.
        FileNotFoundError: A local path does not exist.
        OSError: The hub does not know the name or cannot be reached.
        CompactFileError: A compact folder is damaged; see `load_compact`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_source(name_or_path)
    path = Path(name_or_path).expanduser()
    if dtype is None and path.suffix == ".gguf":
        dtype = torch.float32
    # `from_pretrained` takes "auto" for the checkpoint's own dtype.
    wanted = "auto" if dtype is None else dtype
    if blocks_on_disk:
        if path.suffix in (".gguf", ".json") or (path / INDEX).exists():
            raise ValueError(f"blocks can stay on disk in a Hugging Face folder with safetensors files, not in {path}")
        name = path if path.exists() else name_or_path
        with torch.device("meta"):
            plan = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **NO_CODE), **NO_CODE)
        blocks = find_blocks(plan).path
        device_map: dict[str, str] = {**dict.fromkeys(_modules_outside(plan, blocks), "cpu"), blocks: "disk"}
        return AutoModelForCausalLM.from_pretrained(name, dtype=wanted, device_map=device_map, **NO_CODE)
    if path.suffix == ".gguf":
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        # The config still says that the model is quantised, which forbids saving it. Its weights are dense by now.
        config = copy.deepcopy(loaded.config)
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        return plain
    if path.suffix == ".json":
        config = AutoConfig.from_pretrained(path, **NO_CODE)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32, **NO_CODE)
    if (path / INDEX).exists():
        return load_compact(path, dtype)
    return AutoModelForCausalLM.from_pretrained(path if path.exists() else name_or_path, dtype=wanted, **NO_CODE)


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a model; arguments and errors as for `load_model`."""
    from transformers import AutoTokenizer

    check_source(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if path.suffix == ".json":
        return AutoTokenizer.from_pretrained(path.parent, **NO_CODE)
    return AutoTokenizer.from_pretrained(path if path.exists() else name_or_path, **NO_CODE)


def _modules_outside(model: nn.Module, blocks: str) -> list[str]:
    """Paths of the modules that together hold everything but the decoder blocks."""
    paths: list[str] = []
    parts = blocks.split(".")
    for depth, part in enumerate(parts):
        parent = ".".join(parts[:depth])
        paths += [f"{parent}.{n}".lstrip(".") for n, _ in model.get_submodule(parent).named_children() if n != part]
    return paths
