"""`prune`: a whole model, block after block, without Lightning.

Blocks are done in order. A block's Gram matrices come from the outputs of the pruned blocks before it, and
only one block's exist at a time.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .capture import (
    DecoderBlocks,
    InputGroup,
    accumulate_grams,
    advance,
    evaluation_mode,
    find_blocks,
    find_linears,
    record_inputs,
    refuse_adapters,
    weight_of,
    write_weight,
)
from .journal import Journal, LayerRecord, fingerprint
from .solvers import LayerResult, LayerSolver, MAIHTConfig, Pattern, check_method, parse_pattern, resolve_config

log = logging.getLogger(__name__)


class PruningError(RuntimeError):
    """A layer could not be pruned; the message names it. Blocks before it are pruned, later ones dense."""


@dataclass
class PruningReport:
    """What `prune` did.

    Args:
        layers: One record a linear layer, in the order of the blocks.
        capture_seconds: Wall-clock time of the forward passes and Gram matrices.
        solve_seconds: Wall-clock time of the solver.
    """

    layers: list[LayerRecord] = field(default_factory=list)
    capture_seconds: float = 0.0
    solve_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock time in all."""
        return self.capture_seconds + self.solve_seconds

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned layers, counted."""
        return sum(r.zeros for r in self.layers) / sum(r.shape[0] * r.shape[1] for r in self.layers)


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
) -> PruningReport:
    """Prune the linear layers in the decoder blocks of a causal language model, in place and in one shot.

    Embeddings, norms and the output head stay as they are. The model keeps its dtype, its device and the
    training mode of every module.

    Args:
        model: A Hugging Face causal language model of the LLaMA shape, on the device to compute on.
        windows: Calibration token ids, LongTensor (samples, seqlen).
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
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of windows, at least 1, but found {batch_size!r}")
    structure, settings = parse_pattern(pattern, sparsity), resolve_config(config)
    blocks = find_blocks(model)
    names = [[f"{blocks.path}.{i}.{n}" for n in find_linears(block)] for i, block in enumerate(blocks.modules)]
    _check_weights(model, blocks, structure)
    check_windows(windows, model)

    solver: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "method": method}
    journal = None
    if journal_dir is not None:
        # A budget changes nothing but rounding: after running out of memory, a smaller one may go on.
        lasting = asdict(replace(settings, memory_budget=None))
        if not settings.keep_zeros:
            # Journals of older versions do not know it.
            del lasting["keep_zeros"]
        journal = Journal(journal_dir, {**solver, "config": lasting, **fingerprint(model, windows)})
        if journal.moved_to is not None:
            log.warning("The journal in %s was of another pruning; moved to %s", journal.folder, journal.moved_to)

    report = PruningReport()
    with (
        evaluation_mode(model),
        tqdm(total=sum(map(len, names)), desc="Pruning", unit="layer", disable=not progress) as bar,
    ):
        start = time.perf_counter()
        batches = record_inputs(model, blocks.modules, windows, batch_size)
        report.capture_seconds += time.perf_counter() - start
        for index, block in enumerate(blocks.modules):
            prefix, label = f"{blocks.path}.{index}", f"block {index + 1}/{len(blocks.modules)}"
            done = journal.load(index) if journal is not None else None
            if done is None:
                start = time.perf_counter()
                bar.set_postfix_str(f"{label}, Gram matrices")
                groups = _capture(block, batches, index, prefix)
                captured = time.perf_counter()
                options = {**solver, "config": settings}
                results = _solve(block, groups, prefix, bar, label=label, solver=options)
                report.capture_seconds += captured - start
                report.solve_seconds += time.perf_counter() - captured
                weights = {name: result.weight for name, result in results.items()}
                records = [_record(f"{prefix}.{name}", index, result) for name, result in results.items()]
                if journal is not None:
                    journal.save(index, weights, records)
            else:
                weights, records = done
                bar.set_postfix_str(f"{label}, from the journal")
                bar.update(len(weights))
            _write(block, weights)
            report.layers += records
            if on_block is not None:
                on_block(records)
            if index + 1 < len(blocks.modules):
                start = time.perf_counter()
                advance(block, batches, index)
                report.capture_seconds += time.perf_counter() - start
    return report


def _check_weights(model: nn.Module, blocks: DecoderBlocks, pattern: Pattern) -> None:
    refuse_adapters(model)
    for i, block in enumerate(blocks.modules):
        for name, linear in find_linears(block).items():
            path, weight = f"{blocks.path}.{i}.{name}", weight_of(linear)
            if not weight.is_floating_point():
                raise TypeError(f"{path} has weights of {weight.dtype}: load the model in a floating-point dtype")
            if not all(extreme.isfinite() for extreme in weight.aminmax()):
                raise ValueError(f"{path} has weights that are NaN or infinite: did training diverge?")
            pattern.check_shape(weight.shape, path)


def check_windows(windows: Tensor, model: nn.Module) -> None:
    """Raise `TypeError` or `ValueError` unless `windows` are token ids (samples, seqlen) the model knows."""
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


def _capture(block: nn.Module, batches: list[Any], index: int, prefix: str) -> list[InputGroup]:
    try:
        return accumulate_grams(block, batches, index)
    except (ValueError, RuntimeError) as error:
        raise PruningError(f"{prefix} could not be captured: {error}. It and later blocks are unchanged.") from error


def _solve(
    block: nn.Module, groups: list[InputGroup], prefix: str, bar: Any, *, label: str, solver: dict[str, Any]
) -> dict[str, LayerResult]:
    """Results by name in the block. Empties `groups`, so that a Gram matrix goes when it has been used."""
    linears, results = find_linears(block), {}
    while groups:
        group = groups.pop(0)
        # What fails before the first layer of a group is begun concerns their common inputs, so all of them.
        concerned = group.names
        bar.set_postfix_str(f"{label}, {', '.join(group.names)}")
        try:
            shared = LayerSolver(group.gram, **solver)
            for name in group.names:
                concerned = [name]
                results[name] = result = shared.prune(weight_of(linears[name]))
                bar.set_postfix_str(f"{label}, {name}, error {result.relative_error:.4f}")
                bar.update()
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise PruningError(
                f"{', '.join(f'{prefix}.{name}' for name in concerned)} could not be pruned: {error}. "
                f"This block and later ones are unchanged."
            ) from error
    return results


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


def _record(name: str, block: int, result: LayerResult) -> LayerRecord:
    out_features, in_features = result.weight.shape
    return LayerRecord(
        name=name,
        block=block,
        shape=(out_features, in_features),
        zeros=result.weight.numel() - int(result.weight.count_nonzero()),
        relative_error=result.relative_error,
        objective=result.objective,
        accelerated=result.accelerated,
        seconds=result.seconds,
    )
