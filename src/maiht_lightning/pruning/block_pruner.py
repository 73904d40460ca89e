"""The loop over the decoder blocks: capture Gram matrices, solve the layers, write them back, pass the block.

A block is captured as a whole, or sublayer after sublayer with the layers before each pruned.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from ..capture.grams import InputGroup
from ..distributed import RankError, Ranks
from ..models.blocks import find_linears, weight_of, write_weight
from ..models.offload import BlockLoader, copy_of
from ..records import LayerRecord, PruningReport
from ..solvers import LayerResult, Pattern, PruningSpec
from .journal import Journal, block_file
from .reconstruction import reconstruct
from .solving import prepare_solver, solve_layer
from .streams import Streams, Sublayer

T = TypeVar("T")


class PruningError(RuntimeError):
    """A layer could not be pruned; the message names it. Blocks before it are pruned, later ones dense."""


class BlockPruner:
    """Prunes the blocks of a model in their order, and reports on it.

    Args:
        loader: Hands out the blocks.
        streams: The calibration windows of this process, as inputs of the first block.
        spec: How layers are pruned.
        ranks: The processes that prune together.
        journal: Where finished blocks are saved; only the first process has one.
        journal_dir: Its folder, in all processes: models on disk find their pruned weights in its files.
        bar: The progress bar, which counts layers.
        patterns: Patterns of layers that have their own, by path in the model.
        on_retry: Called with a sentence where memory ran out.

    Attributes:
        report: Times and records so far.
    """

    def __init__(
        self,
        loader: BlockLoader,
        streams: Streams,
        spec: PruningSpec,
        ranks: Ranks,
        journal: Journal | None,
        journal_dir: Path | None,
        bar: "tqdm[None]",
        patterns: Mapping[str, Pattern] | None = None,
        on_retry: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.loader, self.streams, self.spec, self.ranks = loader, streams, spec, ranks
        self.journal, self.journal_dir = journal, journal_dir
        self.patterns, self._on_retry = patterns or {}, on_retry
        self._said: set[str] = set()
        self.report = PruningReport()
        self._bar = bar

    def run(self) -> Iterator[list[LayerRecord]]:
        """Yield the records of one block after another, each when its weights are where the model keeps them.

        Raises:
            PruningError: See there.
        """
        for index in range(len(self.loader)):
            records = self._prune(index)
            self.report.layers += records
            yield records

    def _prune(self, index: int) -> list[LayerRecord]:
        block, start = self.loader.fetch(index), time.perf_counter()
        finished = self.ranks.broadcast_object(self.journal.load(index) if self.journal is not None else None)
        if finished is not None:
            weights, records = finished
            self._show(index, "from the journal")
            self._bar.update(len(records))
            self.streams.settle()
            if self.streams.have_dense:
                self.streams.pass_dense_block(copy_of(block))
            self.put(index, block, weights)
            self.streams.pass_block(block)
            self.loader.prefetch(index + 1)
            self.report.capture_seconds += time.perf_counter() - start
            self.report.resumed += 1
            return records
        if self.spec.config.sublayers or self.streams.have_dense:
            dense = copy_of(block)
            try:
                weights, records = self._prune_beside(dense, block, index)
                self.streams.pass_dense_block(dense)
                if self.spec.config.reconstruction_epochs:
                    self._reconstruct(block, index, weights, records)
                self._save(index, weights, records)
            except BaseException:
                _write(block, {name: weight_of(linear) for name, linear in find_linears(dense).items()})
                raise
        else:
            weights, records = self._prune_groups(block, index)
            self._save(index, weights, records)
        self.put(index, block, weights)
        self.streams.pass_block(block)
        return records

    def _prune_groups(
        self, block: nn.Module, index: int, sublayer: Sublayer | None = None, dense: nn.Module | None = None
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Capture and solve a block as a whole, or one sublayer; returns weights (out, in) and records."""
        start = time.perf_counter()
        self._show(index, "Gram matrices")
        groups, owners = self._capture(block, index, sublayer, dense)
        # Only now: while the batches went through the block before this one, that block was still in memory, and each
        # Gram matrix was still a sum in float64.
        self.loader.prefetch(index + 1)
        captured = time.perf_counter()
        weights, records = self._solve(block, index, groups, owners)
        self.report.capture_seconds += captured - start
        self.report.solve_seconds += time.perf_counter() - captured
        return weights, records

    def _prune_beside(
        self, dense: nn.Module, block: nn.Module, index: int
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Prune a block with its dense copy at hand; returns weights (out, in), which it has already, and records."""
        start = time.perf_counter()
        sublayers: Sequence[Sublayer | None] = [None]
        if self.spec.config.sublayers:
            sublayers = self._captured(index, lambda: self.streams.find_sublayers(block))
        self.report.capture_seconds += time.perf_counter() - start
        weights: dict[str, Tensor] = {}
        records: list[LayerRecord] = []
        for sublayer in sublayers:
            found, more = self._prune_groups(block, index, sublayer, dense)
            _write(block, found)
            weights |= found
            records += more
        return weights, records

    def _reconstruct(
        self, block: nn.Module, index: int, weights: dict[str, Tensor], records: list[LayerRecord]
    ) -> None:
        """Train what is left of a block's weights (out, in); the dense stream passes the dense block."""
        start = time.perf_counter()
        self._show(index, "reconstruction")
        try:
            with self.ranks.errors_shared():
                # What the dense model has after this block is what the pruned block is to return.
                inputs, targets = self.streams.pairs()
            errors = reconstruct(block, inputs, targets, self.spec.config, seed=index, ranks=self.ranks)
        except (ValueError, RuntimeError) as error:
            raise self._failed(index, "reconstructed", error, " reconstruction_epochs = 0 leaves it out.") from error
        linears = find_linears(block)
        for record in records:
            weights[record.layer] = weight_of(linears[record.layer]).detach()
            record.zeros = int((weights[record.layer] == 0).sum())
            record.block_error = errors
        self.report.reconstruction_seconds += time.perf_counter() - start

    def _save(self, index: int, weights: dict[str, Tensor], records: list[LayerRecord]) -> None:
        """Bring a block's weights (out, in) to the disk before the model's change."""
        start = time.perf_counter()
        with self.ranks.errors_shared():
            if self.journal is not None:
                self.journal.save(index, weights, records)
                self.report.journal_seconds += time.perf_counter() - start

    def put(self, index: int, block: nn.Module, weights: dict[str, Tensor]) -> None:
        """Write the pruned weights (out, in) into the block at work, and where the model keeps them."""
        _write(block, weights)
        if self.loader.copies:
            file = None if self.journal_dir is None else block_file(self.journal_dir, index)
            self.loader.write_back(index, weights, file)

    def _captured(self, index: int, work: Callable[[], T]) -> T:
        """Do some work that captures, with errors that say so and that reach the other processes."""
        try:
            with self.ranks.errors_shared():
                return work()
        except (ValueError, RuntimeError) as error:
            raise self._failed(index, "captured", error) from error

    def _capture(
        self, block: nn.Module, index: int, sublayer: Sublayer | None, dense: nn.Module | None
    ) -> tuple[list[InputGroup], list[int]]:
        """Sum Gram matrices over the windows of all processes.

        Returns:
            The groups, and the rank that solves each, which has its matrices (in, in).
        """
        groups = self._captured(index, lambda: self.streams.capture(block, sublayer, dense))
        dtype = self.spec.config.dtype
        linears = find_linears(block)
        # A product with the Gram matrix (in, in) costs in² · out, and the solver's time is nearly all such products.
        costs = [len(g.gram) ** 2 * sum(len(weight_of(linears[name])) for name in g.names) for g in groups]
        owners = self.ranks.assign_by_cost([float(cost) for cost in costs])
        for group, owner in zip(groups, owners, strict=True):
            self.ranks.reduce(group.gram, owner)
            is_mine = owner == self.ranks.rank
            # The owner turns the sum (in, in) from float64 into the solver's dtype; the other ranks drop theirs.
            group.gram = group.gram.to(dtype) if is_mine else group.gram.new_empty(0)
            if group.drift is not None:
                self.ranks.reduce(group.drift, owner)
                group.drift = group.drift.to(dtype) if is_mine else None
        return groups, owners

    def _solve(
        self, block: nn.Module, index: int, groups: list[InputGroup], owners: list[int]
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Solve the block's layers; returns their weights (out, in) by name, the same in all processes, and records.

        Where the block is a copy, its own weights are pruned, which saves memory; else it stays as it is.
        """
        linears = find_linears(block)
        weights: dict[str, Tensor] = {}
        records: dict[str, LayerRecord] = {}
        try:
            with self.ranks.errors_shared():
                for group, owner in zip(groups, owners, strict=True):
                    if owner != self.ranks.rank:
                        continue
                    for name, result in self._solve_group(linears, group, index):
                        records[name] = _record(self._path(index), index, name, result)
                        weights[name] = result.weight
                        if self.loader.copies:
                            write_weight(linears[name], result.weight)
                            weights[name] = weight_of(linears[name]).detach()
                        del result
        except RankError as error:
            raise PruningError(f"{self._path(index)} could not be pruned: {error}") from error
        records = {name: record for part in self.ranks.all_gather_object(records) for name, record in part.items()}
        for group, owner in zip(groups, owners, strict=True):
            for name in group.names:
                if owner != self.ranks.rank:
                    # A buffer (out, in) for the owner's weight; its values are overwritten.
                    weights[name] = weight_of(linears[name]).detach().clone().contiguous()
                    self._bar.update()
                weights[name] = self.ranks.broadcast(weights[name].contiguous(), owner)
        order = [name for group in groups for name in group.names]
        return {name: weights[name] for name in order}, [records[name] for name in order]

    def _solve_group(
        self, linears: dict[str, nn.Module], group: InputGroup, index: int
    ) -> Iterator[tuple[str, LayerResult]]:
        """Yield results by the layer's name. The group gives up its Gram matrix."""
        # Until the first layer of a group is begun, an error concerns their common inputs, and so all of them.
        concerned = group.names
        self._show(index, ", ".join(concerned))
        try:
            shared = prepare_solver(group, self.spec, self._say)
            # The solver has its own scaled copy (in, in) of it now.
            group.gram, group.drift = group.gram.new_empty(0), None
            for name in group.names:
                concerned = [name]
                pattern = self.patterns.get(f"{self._path(index)}.{name}")
                result, shared = solve_layer(shared, weight_of(linears[name]), pattern, self._say)
                self._show(index, f"{name}, error {result.relative_error:.4f}")
                self._bar.update()
                yield name, result
                del result
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise PruningError(
                f"{', '.join(f'{self._path(index)}.{name}' for name in concerned)} could not be pruned: {error}. "
                f"This block and later ones are unchanged."
            ) from error

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._on_retry(message)

    def _failed(self, index: int, what: str, error: Exception, remedy: str = "") -> PruningError:
        path = self._path(index)
        return PruningError(f"{path} could not be {what}: {error}. It and later blocks are unchanged.{remedy}")

    def _path(self, index: int) -> str:
        return f"{self.loader.blocks.path}.{index}"

    def show(self, what: str) -> None:
        """Say beside the progress bar what is done."""
        self._bar.set_postfix_str(what)

    def _show(self, index: int, what: str) -> None:
        self.show(f"block {index + 1}/{len(self.loader)}, {what}")


def _record(path: str, block: int, name: str, result: LayerResult) -> LayerRecord:
    out_features, in_features = result.weight.shape
    return LayerRecord(
        name=f"{path}.{name}",
        block=block,
        shape=(out_features, in_features),
        zeros=result.weight.numel() - int(result.weight.count_nonzero()),
        relative_error=result.relative_error,
        objective=result.objective,
        accelerated=result.accelerated,
        seconds=result.seconds,
        name_in_block=name,
    )


def _write(block: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write all of a block's weights: an interrupt (Ctrl-C) in between is passed on only afterwards."""
    linears = find_linears(block)
    try:
        for name, weight in weights.items():
            write_weight(linears[name], weight)
    except BaseException:
        for name, weight in weights.items():
            write_weight(linears[name], weight)
        raise
