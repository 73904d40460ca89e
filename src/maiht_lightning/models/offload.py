"""Models that are elsewhere than where they are computed: in host memory, on disk, or in shards over processes.

A block at work is then a plain copy of the module on the execution device. Its tensors come from:

- other memory, from which parameters are copied;
- disk, if they are on the meta device with Accelerate's hooks, as `from_pretrained(device_map={...: "disk"})` leaves
  them: they are read from their safetensors files;
- shards, the DTensors of FSDP2 and tensor parallelism, which are gathered.

The next block is read while one is at work, except from shards, which all processes must gather in the same order.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from .blocks import DecoderBlocks, find_linears, weight_of, write_weight

# A copy takes over neither PyTorch's own tables, nor the forward that Accelerate's hooks have put before a module's
# own, nor a compiled call, which would run the module that was copied.
_NOT_COPIED = set(vars(nn.Module())) - {"training"} | {"forward", "_old_forward", "_hf_hook", "_compiled_call_impl"}


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are DTensors, as FSDP2 and tensor parallelism leave them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_tensor(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a module, read from disk or gathered from its shards where necessary.

    Where it has shards, all processes must ask for the same tensors in the same order.

    Raises:
        ValueError: It is on the meta device and nothing says where its values are.
    """
    tensor: Tensor = getattr(module, name)
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    if tensor.is_meta:
        return _stored_values(module)[name]
    return tensor.detach()


def full_weight(linear: nn.Module) -> Tensor:
    """Return a layer's weight (out, in), read from disk or gathered from its shards where necessary."""
    weight = full_tensor(linear, "weight")
    return weight.T if isinstance(linear, Conv1D) else weight


def is_offloaded(model: nn.Module, device: torch.device) -> bool:
    """Whether some parameters must be brought to the execution device."""
    return any(isinstance(p, DTensor) or not _same(p.device, device) for p in model.parameters())


def check_device(device: torch.device | str) -> torch.device:
    """Return a device by its name; raise `ValueError` if there is none of that name here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that PyTorch finds here, such as cpu, but found {str(device)!r} with PyTorch "
            f"{torch.__version__}: {error}"
        ) from error
    return torch.device(device)


def execution_device(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or else that of the first parameter in memory.

    Raises:
        ValueError: See `check_device`.
    """
    if device is not None:
        return check_device(device)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process may still take."""
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that PyTorch's allocator has reserved and does not use is free as well.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def hidden_bytes(model: nn.Module) -> int:
    """Bytes of the hidden state (hidden,) of one token."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return embedding.shape[1] * embedding.element_size()


def without_block_weights(model: nn.Module, blocks: DecoderBlocks, device: torch.device) -> nn.Module:
    """Copy a model to the execution device without the decoder blocks' values, which are on the meta device."""
    in_blocks = {id(module) for block in blocks.modules for module in block.modules()}
    copied: dict[int, Tensor] = {}

    def tensor_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        # Tied weights, such as head and embedding (vocabulary, hidden), stay one tensor.
        if id(tensor) not in copied:
            empty = id(module) in in_blocks
            copied[id(tensor)] = (
                torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                if empty
                else full_tensor(module, name).to(device)
            )
        return copied[id(tensor)]

    return _plain_copy(model, tensor_of)


class BlockLoader:
    """Hands out decoder blocks on the execution device, and writes their pruned weights back; a context.

    Args:
        blocks: The blocks, wherever they are.
        device: Where to compute.

    Attributes:
        copies: Whether the blocks are elsewhere, so that copies are handed out.
    """

    def __init__(self, blocks: DecoderBlocks, device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.copies = any(is_offloaded(block, device) for block in blocks.modules)
        parameters = [parameter for block in blocks.modules for parameter in block.parameters()]
        self._prefetches = self.copies and not any(isinstance(parameter, DTensor) for parameter in parameters)
        self._reader = ThreadPoolExecutor(1, "block-reader") if self._prefetches else None
        self._coming: tuple[int, Future[nn.Module]] | None = None
        # One for all reads: the allocator keeps the memory of each stream apart.
        on_cuda = self._prefetches and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the prefetching."""
        self._coming = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self.blocks.modules)

    def fetch(self, index: int) -> nn.Module:
        """Return a block on the execution device: the block itself, or a copy."""
        block = self.blocks.modules[index]
        if not self.copies:
            return block
        if self._reader is None:
            return self._copy(block)
        coming = self._coming
        copy = coming[1].result() if coming is not None and coming[0] == index else self._copy(block)
        self._coming = None
        if self.device.type == "cuda":
            for tensor in [*copy.parameters(), *copy.buffers()]:
                # Its memory belongs to the reader's stream, and must not be reused before this stream is done with it.
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def block_bytes(self) -> int:
        """Bytes of a block's parameters."""
        return sum(p.numel() * p.element_size() for p in self.blocks.modules[0].parameters())

    def prefetch(self, index: int) -> None:
        """Begin to copy the block that will be fetched next."""
        if self._reader is not None and index < len(self.blocks.modules) and self._coming is None:
            self._coming = index, self._reader.submit(self._read, self.blocks.modules[index])

    def write_back(self, index: int, weights: dict[str, Tensor], file: Path | None) -> None:
        """Write the pruned weights of a block to where the model has them.

        Args:
            index: Index of the block.
            weights: Weights (out, in) by the layer's name in the block.
            file: The safetensors file that holds them under these names, for blocks on disk.
        """
        linears = find_linears(self.blocks.modules[index])
        for name, weight in weights.items():
            linear = linears[name]
            target = weight_of(linear)
            if isinstance(target, DTensor):
                local = distribute_tensor(weight, target.device_mesh, target.placements, src_data_rank=None)
                target.to_local().copy_(local.to_local())
            elif target.is_meta:
                _point_to(linear, file, name, weight)
            else:
                write_weight(linear, weight)

    def _copy(self, block: nn.Module) -> nn.Module:
        return _plain_copy(block, lambda module, name, _: full_tensor(module, name).to(self.device, copy=True))

    @torch.no_grad()
    def _read(self, block: nn.Module) -> nn.Module:
        if self._stream is None:
            return self._copy(block)
        with torch.cuda.stream(self._stream):
            copy = self._copy(block)
        self._stream.synchronize()
        return copy


@contextmanager
def offloaded_forward(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Let a model in host memory run as a whole on another device.

    This is for forward passes that cannot be done block by block. Where the device has room for it, the whole model
    goes there; else Accelerate's hooks bring it layer after layer, in each forward pass. Shards and modules on disk
    have their own hooks. Parameters and buffers are the same objects afterwards, with the values that they had.

    Raises:
        ModuleNotFoundError: Accelerate is not installed, and the model is too large for the device.
    """
    devices = [p.device for p in model.parameters() if not p.is_meta and not isinstance(p, DTensor)]
    on_disk = any(p.is_meta for p in model.parameters())
    if device is None or on_disk or not devices or all(_same(one, device) for one in devices):
        yield
        return
    with _tensors_kept(model):
        if _has_room(device, model):
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.to(device)
            yield
            return
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules

        cpu_offload(model, execution_device=device, offload_buffers=True)
        try:
            yield
        finally:
            remove_hook_from_submodules(model)


@contextmanager
def _tensors_kept(model: nn.Module) -> Iterator[None]:
    """Give a model's modules the parameters and buffers back that they have now, with their values.

    Accelerate puts others in their places: an optimizer and masks would hold parameters that the model no longer has.
    """
    owners = [vars(module)[kind] for module in model.modules() for kind in ("_parameters", "_buffers")]
    kept = [
        (owner, name, tensor, tensor.data) for owner in owners for name, tensor in owner.items() if tensor is not None
    ]
    try:
        yield
    finally:
        for owner, name, tensor, values in kept:
            owner[name] = tensor
            tensor.data = values


def _has_room(device: torch.device, model: nn.Module) -> bool:
    """Whether a GPU has memory for a whole model and, as much again as half of it, for what it computes."""
    if device.type != "cuda":
        return False
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return 1.5 * size <= free_memory(device)


def to_device(arguments: Any, device: torch.device | str) -> Any:
    """Move all tensors in nested tuples, lists and dictionaries to a device; what was one tensor stays one."""
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        return moved.setdefault(id(value), value.to(device)) if isinstance(value, Tensor) else value

    return tree_map(move, arguments)


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index is None or other.index is None or one.index == other.index)


def copy_of(block: nn.Module) -> nn.Module:
    """A block with the values that it has now, on its device, without hooks."""
    return _plain_copy(block, lambda _module, _name, tensor: tensor.detach().clone())


def _plain_copy(module: nn.Module, tensor_of: Callable[[nn.Module, str, Tensor], Tensor]) -> nn.Module:
    """Make a module of the same kind with other tensors, without hooks and without FSDP's sharding."""
    kind = type(module)
    if issubclass(kind, FSDPModule):
        # `fully_shard` has given the module a class that inherits from FSDPModule and its own class.
        kind = next(base for base in kind.__bases__ if base is not FSDPModule)
    copy = kind.__new__(kind)
    nn.Module.__init__(copy)
    vars(copy).update({name: value for name, value in vars(module).items() if name not in _NOT_COPIED})
    for name, parameter in module._parameters.items():
        made = None if parameter is None else nn.Parameter(tensor_of(module, name, parameter), requires_grad=False)
        copy.register_parameter(name, made)
    for name, buffer in module._buffers.items():
        made_buffer = None if buffer is None else tensor_of(module, name, buffer)
        copy.register_buffer(name, made_buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _plain_copy(child, tensor_of)
    return copy


def _stored_values(module: nn.Module) -> Any:
    """Find the mapping from names to values of a module whose parameters Accelerate has offloaded."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", [hook]):
        if getattr(candidate, "weights_map", None) is not None:
            return candidate.weights_map
    raise ValueError(
        f"a {type(module).__name__} is on the meta device and has no values: load the model with from_pretrained, "
        f'where device_map={{..., "disk"}} leaves blocks on disk'
    )


def _point_to(linear: nn.Module, file: Path | None, name: str, weight: Tensor) -> None:
    """Let Accelerate find a layer's weight in another file from now on."""
    values = _stored_values(linear)
    key, loader = "weight", values
    while hasattr(loader, "prefix"):
        key, loader = f"{loader.prefix}{key}", loader.dataset
    if key in loader.state_dict:
        loader.state_dict[key].copy_(weight)
        return
    assert file is not None  # `prune` asks for a journal before
    dtype = str(weight.dtype).removeprefix("torch.")
    loader.index[key] = {"safetensors_file": str(file), "weight_name": name, "dtype": dtype}
