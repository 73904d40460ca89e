"""One decoder block after another: its Gram matrices, its layers' solutions, and the way through it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..capture.block_inputs import Batch
from ..capture.grams import InputGroup, accumulate_grams, advance
from ..distributed import RankError, Ranks
from ..models.blocks import find_linears, weight_of, write_weight
from ..models.offload import BlockLoader
from ..records import LayerRecord, PruningReport
from ..solvers import LayerResult, LayerSolver
from .journal import Journal


class PruningError(RuntimeError):
    """A layer could not be pruned; the message names it. Blocks before it are pruned, later ones dense."""


@dataclass
class BlockPruner:
    """Prunes blocks in their order.

    Args:
        loader: Where the blocks come from.
        batches: The calibration windows of this process, as inputs of the next block.
        ranks: The processes at work.
        journal: Keeps finished blocks; at the first process.
        solver: What `LayerSolver` is told.
        bar: Progress, in layers.
        report: Times and records so far.
    """

    loader: BlockLoader
    batches: list[Batch]
    ranks: Ranks
    journal: Journal | None
    solver: dict[str, Any]
    bar: Any
    report: PruningReport = field(default_factory=PruningReport)
    # The pruned block before the one at work, through which the batches have not been brought yet.
    before: nn.Module | None = None

    def prune_next(self, block: nn.Module, index: int) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        """Weights (out, in) by name in the block, and records. The batches are brought through the block before.

        Where the block is a copy, which saves memory, the weights are its own; else it is left as it is.

        Raises:
            PruningError: See there.
        """
        start = time.perf_counter()
        done = self.ranks.broadcast_object(self.journal.load(index) if self.journal is not None else None)
        if done is not None:
            if self.before is not None:
                advance(self.before, self.batches, index - 1)
                self.before = None
            self.loader.prefetch(index + 1)
            self._show(index, "from the journal")
            self.bar.update(len(done[0]))
            self.report.capture_seconds += time.perf_counter() - start
            self.report.resumed += 1
            return done
        self._show(index, "Gram matrices")
        groups, owners = self._capture(block, index)
        # Not earlier: the block before took its place in memory, and sums in float64 took theirs.
        self.loader.prefetch(index + 1)
        captured = time.perf_counter()
        weights, records = self._solve(block, index, groups, owners)
        self.report.capture_seconds += captured - start
        self.report.solve_seconds += time.perf_counter() - captured
        if self.journal is not None:
            self.journal.save(index, weights, records)
        return weights, records

    def _capture(self, block: nn.Module, index: int) -> tuple[list[InputGroup], list[int]]:
        """The groups of layers, and the process that solves each: it has the Gram matrix, in the solver's dtype."""
        tf32 = self.solver["config"].precision == "tf32"
        try:
            with self.ranks.errors_shared():
                groups = accumulate_grams(block, self.batches, index, before=self.before, tf32=tf32)
        except (ValueError, RuntimeError) as error:
            path = self._path(index)
            raise PruningError(f"{path} could not be captured: {error}. It and later blocks are unchanged.") from error
        self.before = None
        linears = find_linears(block)
        costs = [len(g.gram) ** 2 * sum(len(weight_of(linears[name])) for name in g.names) for g in groups]
        owners = self.ranks.assign_by_cost([float(cost) for cost in costs])
        for group, owner in zip(groups, owners, strict=True):
            self.ranks.reduce(group.gram, owner)
            is_mine = owner == self.ranks.rank
            group.gram = group.gram.to(self.solver["config"].dtype) if is_mine else group.gram.new_empty(0)
        return groups, owners

    def _solve(
        self, block: nn.Module, index: int, groups: list[InputGroup], owners: list[int]
    ) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        linears = find_linears(block)
        weights: dict[str, Tensor] = {}
        records: dict[str, LayerRecord] = {}
        try:
            with self.ranks.errors_shared():
                for group, owner in zip(groups, owners, strict=True):
                    if owner != self.ranks.rank:
                        continue
                    for name, result in self._solve_group(linears, group, index):
                        records[name] = _record(f"{self._path(index)}.{name}", index, result)
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
                    weights[name] = weight_of(linears[name]).detach().clone().contiguous()
                    self.bar.update()
                weights[name] = self.ranks.broadcast(weights[name].contiguous(), owner)
        order = [name for group in groups for name in group.names]
        return {name: weights[name] for name in order}, [records[name] for name in order]

    def _solve_group(
        self, linears: dict[str, nn.Module], group: InputGroup, index: int
    ) -> Iterator[tuple[str, LayerResult]]:
        """Results by the layer's name. The group's Gram matrix is given up."""
        # What fails before the first layer of a group is begun concerns their common inputs, so all of them.
        concerned = group.names
        self._show(index, ", ".join(concerned))
        try:
            shared = LayerSolver(group.gram, **self.solver)
            # From here on the solver has its own.
            group.gram = group.gram.new_empty(0)
            for name in group.names:
                concerned = [name]
                result = shared.prune(weight_of(linears[name]))
                self._show(index, f"{name}, error {result.relative_error:.4f}")
                self.bar.update()
                yield name, result
                del result
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise PruningError(
                f"{', '.join(f'{self._path(index)}.{name}' for name in concerned)} could not be pruned: {error}. "
                f"This block and later ones are unchanged."
            ) from error

    def _path(self, index: int) -> str:
        return f"{self.loader.blocks.path}.{index}"

    def _show(self, index: int, what: str) -> None:
        self.bar.set_postfix_str(f"block {index + 1}/{len(self.loader.blocks.modules)}, {what}")


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
