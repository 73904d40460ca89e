"""The calibration windows on their way through the blocks: as the pruned model sees them, and as the dense one does."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from ..capture.block_inputs import Batch, BlockInputs
from ..capture.entries import Entry
from ..capture.grams import InputGroup, accumulate_grams
from ..capture.sublayers import TOKENS_AT_ONCE, DenseStream, accumulate_group, find_groups
from ..distributed import Ranks
from ..models.blocks import find_linears, weight_of
from ..models.memory import with_room
from ..solvers import MAIHTConfig

T = TypeVar("T")


class Sublayer(NamedTuple):
    """Layers of a block that share an input, and the module that can begin there in each model, if that is kept."""

    names: list[str]
    entry: Entry | None
    dense_entry: Entry | None


class Streams:
    """The hidden states of the calibration windows, and the Gram matrices of what layers see of them.

    Args:
        inputs: The windows of this process, as inputs of the first block.
        config: `sublayers`, `dense_targets` and `precision`.
        ranks: The processes that share the windows.
        dense: The same windows, as inputs of the first block of the dense model; None where it is not needed.
        record: Records the windows in batches of another size, as inputs of the first block, without hidden states.
            None: where memory runs out, nothing is tried again in smaller batches.
        on_retry: Called with a sentence where memory ran out.
        has_room: Whether so many bytes of what layers see may be kept on the device while a block is pruned.
    """

    def __init__(
        self,
        inputs: BlockInputs,
        config: MAIHTConfig,
        ranks: Ranks,
        *,
        dense: BlockInputs | None = None,
        record: Callable[[int], BlockInputs] | None = None,
        on_retry: Callable[[str], None] = lambda _: None,
        has_room: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._inputs, self._dense, self._config, self._ranks = inputs, dense, config, ranks
        self._record, self._on_retry, self._has_room = record, on_retry, has_room

    @property
    def have_dense(self) -> bool:
        """Whether the dense model's hidden states go along."""
        return self._dense is not None

    def settle(self) -> None:
        """Bring all hidden states through the block that was passed last."""
        self._with_room(self._settle)

    def pass_block(self, block: nn.Module) -> None:
        """Pass the pruned block, which stays as it is until its outputs have been asked for."""
        self._inputs.pass_through(block)

    def pass_dense_block(self, block: nn.Module) -> None:
        """Let the dense model's hidden states, where they go along, pass the dense block likewise."""
        if self._dense is not None:
            self._dense.pass_through(block)

    def pairs(self) -> tuple[list[Batch], list[Tensor]]:
        """Inputs of a block that is about to change, and what the dense model has after it (windows, seqlen, hidden).

        The dense block must have been passed.
        """
        assert self._dense is not None
        self._inputs.forget()
        self._settle()
        return self._inputs.batches, [batch.hidden for batch in self._dense.batches]

    def finish(self) -> list[Tensor]:
        """Bring the dense model's hidden states through its last block, and return them (windows, seqlen, hidden).

        The pruned model's are dropped.
        """
        assert self._dense is not None
        # Others hold the object, but nobody holds what was in it.
        self._inputs.batches = []
        self._dense.settle()
        return [batch.hidden for batch in self._dense.batches]

    def find_sublayers(self, block: nn.Module) -> list[Sublayer]:
        """Find which layers of a block share an input, in the order in which they run.

        Raises:
            ValueError: As `accumulate_grams` does.
        """
        # What was kept of the block before is gone once both streams have passed it.
        self.settle()
        groups, entries = self._with_room(lambda: find_groups(block, self._inputs))
        linears, batches = find_linears(block), self._inputs.batches
        tokens = sum(batch.hidden.shape[:-1].numel() for batch in batches)
        item, trains = batches[0].hidden.element_size(), self._config.reconstruction_epochs > 0
        taken = 0

        def kept(names: list[str], is_of_use: bool) -> Entry | None:
            nonlocal taken
            entry = next((each for each in entries if each.layer in names), None)
            size = tokens * weight_of(linears[names[0]]).shape[1] * item
            if entry is None or not is_of_use or not self._has_room(taken + size):
                return None
            taken += size
            return entry

        # What the last layers see is of use for passing the block alone, and not if that is trained before.
        return [
            Sublayer(names, kept(names, not (trains and names is groups[-1])), kept(names, self._fits_to_dense))
            for names in groups
        ]

    def capture(
        self, block: nn.Module, sublayer: Sublayer | None = None, dense_block: nn.Module | None = None
    ) -> list[InputGroup]:
        """Sum the Gram matrices of a block's layers over this process's windows.

        Args:
            block: The block; where a sublayer is asked for, with the layers before it pruned.
            sublayer: Only these layers; None: all of them.
            dense_block: The dense block, which layers with `dense_targets` are fitted to.

        Raises:
            ValueError: As `accumulate_grams` does.
        """
        inputs, tf32, dense = self._inputs, self._config.precision == "tf32", None
        if sublayer is None:
            return self._with_room(lambda: accumulate_grams(block, inputs, tf32=tf32))
        names, entry, dense_entry = sublayer
        if self._dense is not None and dense_block is not None and self._fits_to_dense:
            dense = DenseStream(self._dense, dense_block, dense_entry)
        # Where something is trained, batches are single windows.
        at_once = TOKENS_AT_ONCE if self._config.trains else 1

        def accumulate() -> InputGroup:
            return accumulate_group(block, inputs, names, dense=dense, tf32=tf32, entry=entry, at_once=at_once)

        return [self._with_room(accumulate)]

    @property
    def _fits_to_dense(self) -> bool:
        return self._dense is not None and self._config.dense_targets > 0

    def _settle(self) -> None:
        self._inputs.settle()
        if self._dense is not None:
            self._dense.settle()

    def _with_room(self, work: Callable[[], T]) -> T:
        """Do some work that runs all batches through a block, in smaller ones from where memory has run out on."""

        def sized(batch_size: int) -> T:
            if batch_size < self._inputs.batch_size:
                assert self._record is not None
                recorded = self._record(batch_size)
                self._inputs.split(batch_size, recorded)
                if self._dense is not None:
                    self._dense.split(batch_size, recorded)
            return work()

        # Processes that share the windows would have to agree on it.
        retries = self._ranks.size == 1 and self._record is not None
        size = self._inputs.batch_size
        return with_room("calibration", sized, size, self._on_retry, done="captured", retries=retries)
