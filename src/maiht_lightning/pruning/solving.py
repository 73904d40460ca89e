"""Solving a layer, with less memory where there is not enough."""

from collections.abc import Callable

from torch import Tensor

from ..capture.grams import InputGroup
from ..models.memory import is_out_of_memory, release_memory
from ..solvers import LayerResult, LayerSolver, Pattern, PruningSpec


def prepare_solver(group: InputGroup, spec: PruningSpec, say: Callable[[str], None]) -> LayerSolver:
    """The solver of layers that see the same input; in host memory where a GPU's runs out, which `say` is told."""
    try:
        return LayerSolver(group.gram, spec, group.drift)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or group.gram.device.type == "cpu":
            raise
    release_memory()
    say(f"solver: memory ran out for {len(group.gram)} inputs, so that layers are solved in host memory")
    drift = None if group.drift is None else group.drift.cpu()
    return LayerSolver(group.gram.cpu(), spec, drift, on_host=True)


def solve_layer(
    solver: LayerSolver, weight: Tensor, pattern: Pattern | None, say: Callable[[str], None]
) -> tuple[LayerResult, LayerSolver]:
    """Prune a layer's weight (out, in), with less memory as long as it runs out; returns the solver that had it."""
    while True:
        try:
            return solver.prune(weight, pattern), solver
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or (frugal := solver.with_less_memory(weight)) is None:
                raise
        release_memory()
        solver, how = frugal
        shape = " x ".join(map(str, weight.shape))
        say(f"solver: memory ran out for a layer of {shape} weights, so it is solved {how}")
