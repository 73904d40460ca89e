"""`prune`: a whole model, block after block, without Lightning.

Blocks are done in order. A block's Gram matrices come from the outputs of the pruned blocks before it, and
only one block's exist at a time.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from ..capture.block_inputs import BlockInputs, logits_from_hidden, record_inputs
from ..capture.hidden_states import (
    HiddenStateStore,
    NoStore,
    Storage,
    check_storage,
    choose_storage,
    has_room,
    pinned_bytes,
)
from ..data.batches import CALIBRATION_TOKENS, TokenBatches, Windows
from ..distributed import Ranks
from ..models.blocks import evaluation_mode, find_blocks, find_linears, weight_of
from ..models.memory import forget_peak, peak_of, with_room
from ..models.offload import (
    BlockLoader,
    execution_device,
    hidden_bytes,
    without_block_weights,
)
from ..records import LayerRecord, PruningReport
from ..solvers import MAIHTConfig, Pattern, PruningSpec
from ..solvers.precision import bytes_per_entry
from ..solvers.slices import solver_bytes
from .allocation import allocate, layer_sizes
from .block_pruner import BlockPruner, PruningError
from .checks import check_weights, check_windows
from .journal import Journal, fingerprint
from .rescaling import Rescaling, Window
from .streams import Streams

log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    windows: Tensor | TokenBatches,
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

    A model may be elsewhere than where it is computed: in host memory, with `device` naming a GPU; on disk, as
    `from_pretrained` leaves it with `device_map={..., "model.layers": "disk"}`; or in the shards of FSDP2. Then one
    block at a time is brought to the device, and the next one is read meanwhile. A model on disk finds its pruned
    weights in the journal's files afterwards.

    Args:
        model: A Hugging Face causal language model of the LLaMA shape.
        windows: Calibration token ids (samples, seqlen), int64; or a DataLoader, a list or anything else that gives
            batches of them: dictionaries with `input_ids` and, where they are padded, `attention_mask`, or tensors, or
            tuples of these two. Masked tokens do not count, and packed rows are taken apart where `position_ids` begin
            anew. Of a loader the first 262,144 tokens are taken, and all of a list. Without a mask, windows that begin
            or end with padding are refused.
        sparsity: Fraction of zeros, in [0, 1): exactly floor(sparsity · numel) zeros per layer for `unstructured`,
            floor(sparsity · in) per row for `row`. An `N:M` pattern fixes it, so that it may be left out.
        pattern: `unstructured` (weights compete within a layer), `row` (within an output row), or `N:M` (N kept of
            every M consecutive inputs).
        method: `maiht`, `aiht`, `iht`, `sparsegpt`, `admm`, `wanda` or `magnitude`.
        config: A preset's name, `paper`, `fast`, `accurate`, `balanced` or `best`, perhaps with changes, as in
            `balanced,reconstruction_epochs=2`, or settings one by one, with those left out as in `paper`. By default
            `balanced`, and for other methods than `maiht` as they were published.
        journal_dir: Folder for finished blocks; hidden states on disk go beside it. Called again with the same
            arguments after a crash, with the dense model or the partly pruned one, `prune` resumes with the first
            unfinished block.
        progress: Show a progress bar.
        batch_size: Windows per calibration forward pass; where memory runs out in one process, half as many. Where
            blocks are reconstructed, as with `best`, it is one.
        on_block: Called with a block's records when it is done.
        device: Where to compute; by default where the model is.
        hidden_states: Where the windows' hidden states are stored between blocks: `device`, `host` (pinned), `disk`,
            or `auto`, the first of these with room for them.
        process_group: Processes that prune together, such as `torch.distributed.group.WORLD`: each calls this with
            the same arguments and with the same model, or its shards of one. The windows and the layers are shared
            out, and all end with the same weights. The windows are the first process's, which keeps the journal.

    Returns:
        One record per layer, with times in seconds.

    Raises:
        ValueError, TypeError: A setting, the windows or the model do not fit; nothing was changed.
        PruningError: A layer failed. Its block and later ones are as they were.

    Source:
        Wen, Zuo, Pan, ICML 2025 (PMLR 267:66575-66596), Algorithm 1; the block-by-block way after Frantar &
        Alistarh, *SparseGPT*, ICML 2023.
    """
    spec = PruningSpec.parse(sparsity, pattern, method, config)
    ranks = Ranks(process_group)
    with ranks.errors_shared():
        found = Windows.parse(windows, tokens=CALIBRATION_TOKENS)
    return prune_model(
        model,
        # Every process has a loader of its own, which may shuffle in its own way.
        ranks.broadcast_object(found),
        spec,
        journal_dir=journal_dir,
        progress=progress,
        batch_size=batch_size,
        on_block=on_block,
        device=device,
        hidden_states=hidden_states,
        process_group=process_group,
    )


@torch.no_grad()
def prune_model(
    model: nn.Module,
    windows: Windows,
    spec: PruningSpec,
    *,
    journal_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    batch_size: int = 1,
    on_block: Callable[[list[LayerRecord]], None] | None = None,
    device: torch.device | str | None = None,
    hidden_states: Storage = "auto",
    process_group: ProcessGroup | None = None,
    on_retry: Callable[[str], None] = log.warning,
) -> PruningReport:
    """Prune as `prune` does, with settings and windows that are parsed already; all else is the same.

    `on_retry` is called with a sentence where memory ran out and something is done again with less of it.
    """
    check_storage(hidden_states)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of windows, at least 1, but found {batch_size!r}")
    blocks, ranks = find_blocks(model), Ranks(process_group)
    device = execution_device(model, device)
    spec = spec.on(device)
    check_weights(model, blocks, spec, on_disk_allowed=journal_dir is not None)
    check_windows(windows, model)
    batch_size = spec.config.windows_per_pass(batch_size)
    batches = _share_of_batches(windows, batch_size, ranks)
    started = time.perf_counter()
    journal = None if journal_dir is None else _open_journal(journal_dir, spec, model, windows, ranks)
    journal_seconds = 0.0 if journal is None else time.perf_counter() - started
    journal_dir = None if journal_dir is None else Path(journal_dir)
    loader = BlockLoader(blocks, device)
    working = _working_bytes(batches, spec, loader)
    if hidden_states == "auto":
        hidden_states = _choose_storage(model, batches, spec, loader.device, working)
    shapes = [weight_of(linear).shape for _, linear in blocks.linears()]
    started = time.perf_counter()
    forget_peak(device)
    # What is made in inference mode, in which a caller may be, could not be differentiated where something is trained.
    inference_mode = torch.is_inference_mode_enabled() and not spec.config.trains
    with (
        torch.inference_mode(inference_mode),
        torch.no_grad(),
        # Compiled blocks do not see the hooks that come and go here.
        torch.compiler.set_stance("force_eager"),
        evaluation_mode(model),
        loader,
        HiddenStateStore(hidden_states, loader.device, journal_dir.parent if journal_dir else None) as store,
        tqdm(total=len(shapes), desc="Pruning", unit="layer", disable=not (progress and ranks.is_main)) as bar,
    ):

        def record(batch_size: int, store: HiddenStateStore | NoStore = NoStore()) -> BlockInputs:  # noqa: B008
            parts = [part for batch in batches for part in batch.split(batch_size)]
            return _record_inputs(model, parts, loader, store)

        inputs = with_room(
            "calibration", partial(record, store=store), batch_size, on_retry, done="captured", retries=ranks.size == 1
        )
        patterns = _allocate(loader, inputs, store, spec, ranks, journal)
        dense = inputs.twin(store) if spec.config.has_dense_stream else None

        def keeps(size: int) -> bool:
            return hidden_states != "disk" and has_room(size, device=loader.device, working=working)

        streams = Streams(inputs, spec.config, ranks, dense=dense, record=record, on_retry=on_retry, has_room=keeps)
        pruner = BlockPruner(loader, streams, spec, ranks, journal, journal_dir, bar, patterns, on_retry)
        pruner.report.capture_seconds = time.perf_counter() - started
        pruner.report.journal_seconds = journal_seconds
        for records in pruner.run():
            if on_block is not None:
                on_block(records)
        if spec.config.rescaling_epochs:
            _rescale(pruner, model, batches, partial(record, store=store))
        pruner.report.peak_memory_bytes = peak_of(device)
    return pruner.report


def _rescale(
    pruner: BlockPruner, model: nn.Module, batches: list[Tensor], record: Callable[[int], BlockInputs]
) -> None:
    """Multiply the rows and columns of the pruned weights with factors, learnt now or by an earlier process."""
    start = time.perf_counter()
    loader, ranks, report = pruner.loader, pruner.ranks, pruner.report
    outer = _at_hand(model, loader)
    logits = partial(logits_from_hidden, outer, find_blocks(outer).modules)
    rescaling = Rescaling(loader, logits, ranks=ranks, on_step=pruner.show)
    known = ranks.broadcast_object(None if pruner.journal is None else pruner.journal.rescaling())
    if known is not None:
        rescaling.factors.copy_(known[0])
        report.divergence = known[1]
    else:
        try:
            with ranks.errors_shared():
                # In this order, so that the pruned model's hidden states are gone before there are others.
                targets = pruner.streams.finish()
                tokens = [batch.to(loader.device) for batch in batches]
                windows = [Window(*each) for each in zip(record(1).batches, tokens, targets, strict=True)]
            report.divergence = rescaling.learn(windows, pruner.spec.config.rescaling_epochs)
        except (ValueError, RuntimeError) as error:
            raise PruningError(
                f"the pruned model could not be rescaled: {error}. Its blocks are pruned. rescaling_epochs = 0 leaves "
                f"it out."
            ) from error
        with ranks.errors_shared():
            if pruner.journal is not None:
                pruner.journal.save_rescaling(rescaling.factors, report.divergence)
    # Factors are far from 0, so that no weight becomes 0 and the counts of zeros stay.
    for index in range(len(loader)):
        block = loader.fetch(index)
        loader.prefetch(index + 1)
        pruner.put(index, block, rescaling.weights(index, block))
    report.rescaling_seconds = time.perf_counter() - start


def _share_of_batches(windows: Windows, batch_size: int, ranks: Ranks) -> list[Tensor]:
    """Batches of windows for this process: whole ones, so that each is what it would be with one process."""
    batches = windows.batches(batch_size)
    if len(batches) < ranks.size:
        raise ValueError(
            f"{windows.samples} windows in batches of {batch_size} are too few for {ranks.size} processes: take more "
            f"windows, a smaller batch_size or fewer processes"
        )
    return ranks.shard(batches)


def _at_hand(model: nn.Module, loader: BlockLoader) -> nn.Module:
    """The model on the device: itself, or a copy without the blocks' weights where it is elsewhere."""
    return without_block_weights(model, loader.blocks, loader.device) if loader.copies else model


def _record_inputs(
    model: nn.Module, batches: list[Tensor], loader: BlockLoader, store: HiddenStateStore | NoStore
) -> BlockInputs:
    # Embeddings and whatever else is around the blocks come to the device for this alone, and leave it afterwards.
    source = _at_hand(model, loader)
    return record_inputs(source, find_blocks(source).modules, batches, device=loader.device, store=store)


def _open_journal(
    folder: str | os.PathLike[str], spec: PruningSpec, model: nn.Module, windows: Windows, ranks: Ranks
) -> Journal | None:
    """Open the journal, in the first process alone."""
    # All processes take part, since shards have to be gathered for the fingerprint.
    fingerprints = fingerprint(model, windows)
    with ranks.errors_shared():
        settings, needs_dense = {**spec.identity(), **fingerprints}, spec.config.has_dense_stream
        journal = Journal(folder, settings, needs_dense=needs_dense) if ranks.is_main else None
    if journal is not None and journal.moved_to is not None:
        log.warning("The journal in %s was of another pruning; moved to %s", journal.folder, journal.moved_to)
    return journal


def _allocate(
    loader: BlockLoader,
    inputs: BlockInputs,
    store: HiddenStateStore,
    spec: PruningSpec,
    ranks: Ranks,
    journal: Journal | None,
) -> dict[str, Pattern]:
    """Patterns of the layers by path, with the zeros that a journal's blocks were pruned with; none if uniform."""
    if spec.config.allocation == "uniform":
        return {}
    sizes = layer_sizes(loader, spec)
    zeros = ranks.broadcast_object(None if journal is None else journal.allocation())
    if zeros is None or zeros.keys() != {layer.path for layer in sizes}:
        zeros = allocate(loader, sizes, inputs.twin(store) if spec.config.measures_dense else None, spec, ranks)
        with ranks.errors_shared():
            if journal is not None:
                journal.save_allocation(zeros)
    return {layer.path: spec.pattern.with_zeros(zeros[layer.path], layer.size) for layer in sizes}


def _working_bytes(batches: list[Tensor], spec: PruningSpec, loader: BlockLoader) -> int:
    """Count the bytes that a block at work, its Gram matrices and its solver need on the device."""
    linears = find_linears(loader.blocks.modules[0]).values()
    shapes = [weight_of(linear).shape for linear in linears]
    config, item = spec.config, spec.config.dtype.itemsize
    # Each distinct input has a Gram matrix (in, in), a sum in float64 that is then copied.
    grams = 2 * sum({inputs: 8 * inputs**2 for _, inputs in shapes}.values())
    matrices = 2 * item + bytes_per_entry(config.precision)
    solver = max(solver_bytes(s, config.dtype, config.memory_budget) + matrices * s[1] ** 2 for s in shapes)
    # Three blocks may be on the device: the one at work, the one before it and the one that is read meanwhile.
    working = grams + solver + 3 * loader.block_bytes()
    # In a block the outputs of its layers (tokens, out) may all be there, and the widest input in float32.
    item = next(weight_of(linear).element_size() for linear in linears)
    in_a_block = item * sum(outputs for outputs, _ in shapes) + 4 * max(inputs for _, inputs in shapes)
    return working + max(batch.numel() for batch in batches) * in_a_block


def _choose_storage(
    model: nn.Module, batches: list[Tensor], spec: PruningSpec, device: torch.device, working: int
) -> Storage:
    """Choose where the hidden states of batches go, with room on the device for what works there."""
    streams = 2 if spec.config.has_dense_stream or spec.config.measures_dense else 1
    sizes = [batch.numel() * hidden_bytes(model) for batch in batches]
    return choose_storage(streams * sum(sizes), device, working, pinned=streams * sum(map(pinned_bytes, sizes)))
