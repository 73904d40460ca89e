"""When to prune: at the end of a fit, somewhere in it, or in several steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..solvers import PruningSpec

UNITS = ("epoch", "step")
EXPECTED = "'end', 'epoch:K', 'step:K', or a schedule such as {'epoch:1': 0.3, 'epoch:2': 0.5}"


@dataclass(frozen=True)
class PruningStep:
    """One pruning in a fit.

    Args:
        unit: `end`, `epoch` or `step`.
        count: Epochs or optimizer steps done before it; 0 for `end`.
        spec: How the model is pruned then.
    """

    unit: str
    count: int
    spec: PruningSpec

    @property
    def name(self) -> str:
        """As in the settings, such as `epoch:1`."""
        return self.unit if self.unit == "end" else f"{self.unit}:{self.count}"

    def is_due(self, epochs: int, steps: int) -> bool:
        """Whether so many epochs and optimizer steps are enough; never for `end`, which no count reaches."""
        return {"epoch": epochs >= self.count, "step": steps >= self.count}.get(self.unit, False)


def parse_schedule(prune_at: str | Mapping[str, float], spec: PruningSpec) -> list[PruningStep]:
    """Read `prune_at`.

    Args:
        prune_at: `end`, `epoch:K`, `step:K` (after K epochs or optimizer steps, K at least 1), or a sparsity for each
            of several of them, in order and growing.
        spec: How to prune, with the sparsity that holds where `prune_at` gives none.

    Raises:
        ValueError: It is something else.
    """
    given = {prune_at: spec.sparsity} if isinstance(prune_at, str) else dict(prune_at)
    steps = [_parse_step(name, value, spec) for name, value in given.items()]
    if not steps:
        raise ValueError(f"prune_at must be {EXPECTED}, but found nothing")
    before_end = {step.unit for step in (steps[:-1] if steps[-1].unit == "end" else steps)}
    if "end" in before_end or len(before_end) > 1:
        raise ValueError(f"prune_at must count epochs or steps, not both, and `end` last, but found {prune_at!r}")
    for one, two in pairwise(steps):
        if two.spec.sparsity <= one.spec.sparsity or (two.unit != "end" and two.count <= one.count):
            raise ValueError(
                f"prune_at must go on in time and in sparsity, since zeros only grow, but found {one.name} with "
                f"{one.spec.sparsity:g} before {two.name} with {two.spec.sparsity:g}"
            )
    return steps


def _parse_step(name: str, sparsity: float, spec: PruningSpec) -> PruningStep:
    unit, _, count = str(name).partition(":")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"prune_at: the sparsity at {name} must lie in [0, 1), but found {sparsity!r}")
    if name == "end":
        return PruningStep("end", 0, spec.at(sparsity))
    if unit not in UNITS or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"prune_at must be {EXPECTED}, with K a whole number, at least 1, but found {name!r}")
    return PruningStep(unit, int(count), spec.at(sparsity))
