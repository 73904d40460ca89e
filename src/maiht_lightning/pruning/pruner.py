"""`prune`: a whole model, block after block, without Lightning.

Blocks are done in order. A block's Gram matrices come from the outputs of the pruned blocks before it, and
only one block's exist at a time.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..capture.block_inputs import record_inputs
from ..capture.hidden_states import Storage, check_storage, choose_storage, keeping
from ..distributed import Ranks
from ..models.blocks import (
    DecoderBlocks,
    evaluation_mode,
    find_blocks,
    find_linears,
    refuse_adapters,
    weight_of,
    write_weight,
)
from ..models.offload import BlockLoader, execution_device, full_tensor, hidden_bytes, without_block_weights
from ..records import LayerRecord, PruningReport
from ..solvers import MAIHTConfig, Pattern, check_method, parse_pattern, resolve_config
from ..solvers.slices import MATRICES
from .block_pruner import BlockPruner
from .journal import Journal, block_file, fingerprint

log = logging.getLogger(__name__)


@torch.no_grad()
def prune(
    model: nn.Module,
    windows: Tensor,
    *,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    method: str = "maiht",
    config: MAIHTConfig | str | None = None,
    journal_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    batch_size: int = 1,
    on_block: Callable[[list[LayerRecord]], None] | None = None,
    device: torch.device | str | None = None,
    hidden_states: Storage = "auto",
    process_group: ProcessGroup | None = None,
) -> PruningReport:
    """Prune the linear layers in the decoder blocks of a causal language model, in place and in one shot.

    Embeddings, norms and the output head stay as they are. The model keeps its dtype, its device and the
    training mode of every module.

    A model need not lie where it is computed: in host memory, with `device` naming a GPU; on disk, as `from_pretrained`
    leaves it with `device_map={..., "model.layers": "disk"}`; or in the shards of FSDP2. Then one block at a time is
    brought to the device, and the next one read meanwhile. A model on disk finds its pruned weights in the journal's
    files afterwards.

    Args:
        model: A Hugging Face causal language model of the LLaMA shape.
        windows: Calibration token ids, LongTensor (samples, seqlen). Each must be whole: there is no attention mask, so
            that padding would count in the Gram matrices. Windows that begin or end with padding are refused.
        sparsity: Fraction of zeros in [0, 1): exactly floor(sparsity · numel) a layer for `unstructured`.
        pattern: `unstructured` (compared within a layer), `row` (within an output row), or `N:M` (N kept of
            every M consecutive inputs).
        method: See `prune_layer`.
        config: Settings of the solver, or a preset's name; the paper's by default.
        journal_dir: Folder for finished blocks. Called again with the same arguments after a crash, with the
            dense model or the partly pruned one, `prune` goes on with the first unfinished block.
        progress: Show a progress bar.
        batch_size: Windows a calibration forward pass.
        on_block: Called with a block's records when it is done.
        device: Where to compute; by default where the model is.
        hidden_states: Where the windows' hidden states are kept: `device`, `host` (pinned), `disk`, or `auto`, the
            first of these with room for them.
        process_group: Processes that prune together, such as `torch.distributed.group.WORLD`: each calls this with
            the same arguments and with the same model, or its shards of one. The windows and the layers are shared
            out, and all end with the same weights. The first process keeps the journal.

    Returns:
        One record a layer, with times in seconds.

    Raises:
        ValueError, TypeError: A setting, the windows or the model do not fit; nothing was changed.
        PruningError: A layer failed. Its block and later ones are as they were.

    Source:
        Wen, Zuo, Pan, ICML 2025 (PMLR 267:66575-66596), Algorithm 1; the block-by-block way after Frantar &
        Alistarh, *SparseGPT*, ICML 2023.
    """
    check_method(method)
    check_storage(hidden_states)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of windows, at least 1, but found {batch_size!r}")
    structure, settings = parse_pattern(pattern, sparsity), resolve_config(config)
    blocks, ranks = find_blocks(model), Ranks(process_group)
    names = [[f"{blocks.path}.{i}.{n}" for n in find_linears(block)] for i, block in enumerate(blocks.modules)]
    _check_weights(model, blocks, structure, on_disk_allowed=journal_dir is not None)
    check_windows(windows, model)
    if len(windows.split(batch_size)) < ranks.size:
        raise ValueError(
            f"{len(windows)} windows in batches of {batch_size} are too few for {ranks.size} processes: take more "
            f"windows, a smaller batch_size or fewer processes"
        )

    solver: dict[str, Any] = {"sparsity": structure.sparsity, "pattern": pattern, "method": method, "config": settings}
    journal = None if journal_dir is None else _open_journal(journal_dir, solver, model, windows, ranks)
    loader = BlockLoader(blocks, execution_device(model, device))
    begun = time.perf_counter()
    with (
        evaluation_mode(model),
        loader,
        tqdm(total=sum(map(len, names)), desc="Pruning", unit="layer", disable=not (progress and ranks.is_main)) as bar,
    ):
        source = without_block_weights(model, blocks, loader.device) if loader.copies else model
        kept = hidden_states
        if kept == "auto":
            kept = _choose_storage(model, blocks, windows.numel() // ranks.size, loader)
        folder = None if journal_dir is None else Path(journal_dir).parent
        with keeping(kept, loader.device, folder) as keep:
            # Whole batches, so that each is what it would be with one process.
            share = torch.cat(ranks.shard(windows.split(batch_size)))
            inside = find_blocks(source).modules
            batches = record_inputs(source, inside, share, batch_size, device=loader.device, keep=keep)
            del source, inside, keep
            work = BlockPruner(loader, batches, ranks, journal, solver, bar)
            del batches
            work.report.capture_seconds += time.perf_counter() - begun
            for index in range(len(blocks.modules)):
                block = loader.fetch(index)
                weights, records = work.prune_next(block, index)
                _write(block, weights)
                if loader.copies:
                    loader.write_back(index, weights, None if journal_dir is None else block_file(journal_dir, index))
                work.report.layers += records
                if on_block is not None:
                    on_block(records)
                work.before = block
                # So that no block is kept longer than until the batches have been brought through it.
                del block, weights
    return work.report


def _open_journal(
    folder: str | os.PathLike[str], solver: dict[str, Any], model: nn.Module, windows: Tensor, ranks: Ranks
) -> Journal | None:
    """The journal, at the first process."""
    # By all processes, since shards have to be gathered for it.
    fingerprints = fingerprint(model, windows)
    with ranks.errors_shared():
        journal = Journal(folder, {**_lasting(solver), **fingerprints}) if ranks.is_main else None
    if journal is not None and journal.moved_to is not None:
        log.warning("The journal in %s was of another pruning; moved to %s", journal.folder, journal.moved_to)
    return journal


def _lasting(solver: dict[str, Any]) -> dict[str, Any]:
    """What decides a pruning's result, for its journal."""
    # A budget changes nothing but rounding: after running out of memory, a smaller one may go on.
    return {**solver, "config": asdict(replace(solver["config"], memory_budget=None))}


def _choose_storage(model: nn.Module, blocks: DecoderBlocks, tokens: int, loader: BlockLoader) -> Storage:
    """Where the hidden states go: the budget is what the device has beside a block and what is done with it."""
    shapes = [weight_of(linear).shape for linear in find_linears(blocks.modules[0]).values()]
    grams = sum({inputs: 8 * inputs**2 for _, inputs in shapes}.values()) * 2
    solver = max(4 * (out * inputs * MATRICES + 2 * inputs**2) for out, inputs in shapes)
    working = grams + solver + 3 * loader.block_bytes()
    return choose_storage(tokens * hidden_bytes(model), loader.device, working)


def _check_weights(model: nn.Module, blocks: DecoderBlocks, pattern: Pattern, *, on_disk_allowed: bool) -> None:
    refuse_adapters(model)
    for i, block in enumerate(blocks.modules):
        for name, linear in find_linears(block).items():
            path, weight = f"{blocks.path}.{i}.{name}", weight_of(linear)
            if not weight.is_floating_point():
                raise TypeError(f"{path} has weights of {weight.dtype}: load the model in a floating-point dtype")
            pattern.check_shape(weight.shape, path)
            if weight.is_meta:
                if not on_disk_allowed:
                    raise ValueError(f"{path} is on disk, and its pruned weights need a place there: give journal_dir")
                if isinstance(linear, Conv1D):
                    raise ValueError(f"{path} is a Conv1D on disk, which is not supported: load the model into memory")
            if weight.is_meta or isinstance(weight, DTensor):
                weight = full_tensor(linear, "weight")
            if not all(extreme.isfinite() for extreme in weight.aminmax()):
                raise ValueError(f"{path} has weights that are NaN or infinite: did training diverge?")


def check_windows(windows: Tensor, model: nn.Module) -> None:
    """Raise `TypeError` or `ValueError` unless `windows` are whole token ids (samples, seqlen) the model knows."""
    if not isinstance(windows, Tensor) or windows.dtype != torch.long:
        found = windows.dtype if isinstance(windows, Tensor) else type(windows).__name__
        raise TypeError(f"windows must be a LongTensor of token ids (samples, seqlen), but found {found}")
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(
            f"windows must have shape (samples, seqlen), both at least 1, but found {tuple(windows.shape)}"
        )
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"windows hold token ids from {low} to {high}, but the model knows 0 to {vocabulary}: "
            f"were they made with another model's tokenizer?"
        )
    if padded := _count_padded(windows, getattr(model, "config", None)):
        raise ValueError(
            f"windows must be whole, since there is no attention mask and padding would count in the Gram matrices, "
            f"but {padded} of {len(windows)} begin or end with padding tokens: cut them from longer text, or join "
            f"short texts end to end"
        )


def _count_padded(windows: Tensor, config: Any) -> int:
    """How many windows (samples, seqlen) look padded: they begin or end with a run of the padding token."""
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    # Tokenizers without a padding token are commonly told to pad with the end-of-text token.
    padding = getattr(config, "pad_token_id", None)
    padding = next(iter(ends), None) if padding is None else padding
    # One end-of-text token at a window's edge is where a document of packed text ends. Two are, if documents begin
    # with the same token. A longer run is no text: of padded windows, nearly all but the longest have one.
    shortest = 3 if padding in ends and padding == getattr(config, "bos_token_id", None) else 2
    if padding is None or windows.shape[1] < shortest:
        return 0
    is_padding = windows == padding
    return int((is_padding[:, :shortest].all(1) | is_padding[:, -shortest:].all(1)).sum())


def _write(block: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write a block's weights, all of them: an interrupt (Ctrl-C) in between is passed on afterwards."""
    linears = find_linears(block)
    try:
        for name, weight in weights.items():
            write_weight(linears[name], weight)
    except BaseException:
        for name, weight in weights.items():
            write_weight(linears[name], weight)
        raise
