"""The loop over the decoder blocks: capture Gram matrices, solve the layers, write them back, pass the block.

A block is captured as a whole, or sublayer after sublayer with the layers before each pruned. Beside the pruned model's
hidden states the dense model's may go along, for layers that are fitted to its outputs, and for reconstruction.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from ..capture.block_inputs import BlockInputs
from ..capture.grams import InputGroup, accumulate_grams
from ..capture.sublayers import DenseStream, accumulate_group, find_groups
from ..distributed import RankError, Ranks
from ..models.blocks import find_linears, weight_of, write_weight
from ..models.memory import with_room
from ..models.offload import BlockLoader, copy_of
from ..records import LayerRecord, PruningReport
from ..solvers import LayerResult, Pattern, PruningSpec
from .journal import Journal, block_file
from .reconstruction import reconstruct
from .solving import prepare_solver, solve_layer

T = TypeVar("T")


class PruningError(RuntimeError):
    """A layer could not be pruned; the message names it. Blocks before it are pruned, later ones dense."""


class BlockPruner:
    """Prunes the blocks of a model in their order, and reports on it.

    Args:
        loader: Hands out the blocks.
        inputs: The calibration windows of this process, as inputs of the first block.
        spec: How layers are pruned.
        ranks: The processes that prune together.
        journal: Where finished blocks are saved; only the first process has one.
        journal_dir: Its folder, in all processes: models on disk find their pruned weights in its files.
        bar: The progress bar, which counts layers.
        dense: The same windows, as inputs of the first block of the dense model; None where it is not needed.
        patterns: Patterns of layers that have their own, by path in the model.
        record: Records the windows in batches of another size, as inputs of the first block, without hidden states.
            None: where memory runs out, nothing is tried again in smaller batches.
        on_retry: Called with a sentence where memory ran out.

    Attributes:
        report: Times and records so far.
    """

    def __init__(
        self,
        loader: BlockLoader,
        inputs: BlockInputs,
        spec: PruningSpec,
        ranks: Ranks,
        journal: Journal | None,
        journal_dir: Path | None,
        bar: "tqdm[None]",
        dense: BlockInputs | None = None,
        patterns: Mapping[str, Pattern] | None = None,
        record: Callable[[int], BlockInputs] | None = None,
        on_retry: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.loader, self.inputs, self.spec, self.ranks = loader, inputs, spec, ranks
        self.journal, self.journal_dir = journal, journal_dir
        self.dense, self.patterns = dense, patterns or {}
        self._record, self._on_retry = record, on_retry
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
            self._with_room(self._settle)
            if self.dense is not None:
                self.dense.pass_through(copy_of(block))
            self._put(index, block, weights)
            self.inputs.pass_through(block)
            self.loader.prefetch(index + 1)
            self.report.capture_seconds += time.perf_counter() - start
            self.report.resumed += 1
            return records
        if self.spec.config.sublayers or self.dense is not None:
            dense = copy_of(block)
            try:
                weights, records = self._prune_beside(dense, block, index)
                if self.dense is not None:
                    self.dense.pass_through(dense)
                if self.spec.config.reconstruction_epochs:
                    self._reconstruct(block, index, weights, records)
                self._save(index, weights, records)
            except BaseException:
                _write(block, {name: weight_of(linear) for name, linear in find_linears(dense).items()})
                raise
        else:
            weights, records = self._prune_groups(block, index)
            self._save(index, weights, records)
        self._put(index, block, weights)
        self.inputs.pass_through(block)
        return records

    def _prune_groups(
        self, block: nn.Module, index: int, names: list[str] | None = None, dense: DenseStream | None = None
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Capture and solve a block as a whole, or one group of its layers; returns weights (out, in) and records."""
        start = time.perf_counter()
        self._show(index, "Gram matrices")
        groups, owners = self._capture(block, index, names, dense)
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
        config, stream = self.spec.config, None
        if self.dense is not None and config.dense_targets:
            stream = DenseStream(self.dense, dense)
        weights: dict[str, Tensor] = {}
        records: list[LayerRecord] = []
        start = time.perf_counter()
        for names in self._find_groups(block, index) if config.sublayers else [None]:
            self.report.capture_seconds += time.perf_counter() - start
            found, more = self._prune_groups(block, index, names, stream)
            _write(block, found)
            weights |= found
            records += more
            start = time.perf_counter()
        return weights, records

    def _find_groups(self, block: nn.Module, index: int) -> list[list[str]]:
        try:
            with self.ranks.errors_shared():
                return self._with_room(lambda: find_groups(block, self.inputs))
        except (ValueError, RuntimeError) as error:
            raise self._failed(index, "captured", error) from error

    def _reconstruct(
        self, block: nn.Module, index: int, weights: dict[str, Tensor], records: list[LayerRecord]
    ) -> None:
        """Train what is left of a block's weights (out, in); the dense stream passes the dense block."""
        assert self.dense is not None
        start = time.perf_counter()
        self._show(index, "reconstruction")
        try:
            with self.ranks.errors_shared():
                # What the dense model has after this block is what the pruned block is to return.
                self._settle()
            targets = [batch.hidden for batch in self.dense.batches]
            errors = reconstruct(block, self.inputs.batches, targets, self.spec.config, seed=index, ranks=self.ranks)
        except (ValueError, RuntimeError) as error:
            raise self._failed(index, "reconstructed", error, " reconstruction_epochs = 0 leaves it out.") from error
        linears = find_linears(block)
        for record in records:
            weights[record.layer] = weight_of(linears[record.layer]).detach()
            record.zeros = int((weights[record.layer] == 0).sum())
            record.block_error = errors
        self.report.reconstruction_seconds += time.perf_counter() - start

    def _settle(self) -> None:
        """Bring all hidden states through the block that was passed last."""
        self.inputs.settle()
        if self.dense is not None:
            self.dense.settle()

    def _with_room(self, work: Callable[[], T]) -> T:
        """Do some work that runs all batches through a block, in smaller ones from where memory has run out on."""

        def sized(batch_size: int) -> T:
            if batch_size < self.inputs.batch_size:
                assert self._record is not None
                recorded = self._record(batch_size)
                self.inputs.split(batch_size, recorded)
                if self.dense is not None:
                    self.dense.split(batch_size, recorded)
            return work()

        # Processes that share the windows would have to agree on it.
        retries = self.ranks.size == 1 and self._record is not None
        return with_room("calibration", sized, self.inputs.batch_size, self._on_retry, done="captured", retries=retries)

    def _save(self, index: int, weights: dict[str, Tensor], records: list[LayerRecord]) -> None:
        """Bring a block's weights (out, in) to the disk before the model's change."""
        start = time.perf_counter()
        with self.ranks.errors_shared():
            if self.journal is not None:
                self.journal.save(index, weights, records)
                self.report.journal_seconds += time.perf_counter() - start

    def _put(self, index: int, block: nn.Module, weights: dict[str, Tensor]) -> None:
        """Write the pruned weights (out, in) into the block at work, and where the model keeps them."""
        _write(block, weights)
        if self.loader.copies:
            file = None if self.journal_dir is None else block_file(self.journal_dir, index)
            self.loader.write_back(index, weights, file)

    def _capture(
        self, block: nn.Module, index: int, names: list[str] | None, dense: DenseStream | None
    ) -> tuple[list[InputGroup], list[int]]:
        """Sum the Gram matrices of all groups, or of one that has these layers, in the block as it is now.

        Returns:
            The groups, and the rank that solves each, which has its matrices (in, in).
        """
        config = self.spec.config
        tf32 = config.precision == "tf32"
        try:
            with self.ranks.errors_shared():
                if names is None:
                    groups = self._with_room(lambda: accumulate_grams(block, self.inputs, tf32=tf32))
                else:
                    groups = [
                        self._with_room(lambda: accumulate_group(block, self.inputs, names, dense=dense, tf32=tf32))
                    ]
        except (ValueError, RuntimeError) as error:
            raise self._failed(index, "captured", error) from error
        linears = find_linears(block)
        # A product with the Gram matrix (in, in) costs in² · out, and the solver's time is nearly all such products.
        costs = [len(g.gram) ** 2 * sum(len(weight_of(linears[name])) for name in g.names) for g in groups]
        owners = self.ranks.assign_by_cost([float(cost) for cost in costs])
        for group, owner in zip(groups, owners, strict=True):
            self.ranks.reduce(group.gram, owner)
            is_mine = owner == self.ranks.rank
            # The owner turns the sum (in, in) from float64 into the solver's dtype; the other ranks drop theirs.
            group.gram = group.gram.to(config.dtype) if is_mine else group.gram.new_empty(0)
            if group.drift is not None:
                self.ranks.reduce(group.drift, owner)
                group.drift = group.drift.to(config.dtype) if is_mine else None
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

    def _show(self, index: int, what: str) -> None:
        self._bar.set_postfix_str(f"block {index + 1}/{len(self.loader)}, {what}")


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
