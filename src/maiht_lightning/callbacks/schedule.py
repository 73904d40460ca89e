"""When to prune: at the end of a fit, somewhere in it, or in several shots."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

UNITS = ("epoch", "step")
EXPECTED = "'end', 'epoch:K', 'step:K', or a schedule such as {'epoch:1': 0.3, 'epoch:2': 0.5}"


@dataclass(frozen=True)
class PruningStep:
    """One pruning in a fit.

    Args:
        unit: `end`, `epoch` or `step`.
        count: Epochs or optimizer steps done before it; 0 for `end`.
        sparsity: Fraction of zeros after it.
    """

    unit: str
    count: int
    sparsity: float

    @property
    def name(self) -> str:
        """As in the settings, such as `epoch:1`."""
        return self.unit if self.unit == "end" else f"{self.unit}:{self.count}"

    def is_due(self, epochs: int, steps: int) -> bool:
        """Whether so many epochs and optimizer steps are enough; never for `end`, which no count reaches."""
        return {"epoch": epochs >= self.count, "step": steps >= self.count}.get(self.unit, False)


def parse_schedule(prune_at: str | Mapping[str, float], sparsity: float) -> list[PruningStep]:
    """Read `prune_at`.

    Args:
        prune_at: `end`, `epoch:K`, `step:K` (after K epochs or optimizer steps, K at least 1), or a sparsity for each
            of several of them, in order and growing.
        sparsity: Fraction of zeros where `prune_at` gives none.

    Raises:
        ValueError: It is something else.
    """
    given = {prune_at: sparsity} if isinstance(prune_at, str) else dict(prune_at)
    shots = [_parse_step(name, value) for name, value in given.items()]
    if not shots:
        raise ValueError(f"prune_at must be {EXPECTED}, but found nothing")
    before_end = {shot.unit for shot in (shots[:-1] if shots[-1].unit == "end" else shots)}
    if "end" in before_end or len(before_end) > 1:
        raise ValueError(f"prune_at must count epochs or steps, not both, and `end` last, but found {prune_at!r}")
    for one, two in pairwise(shots):
        if two.sparsity <= one.sparsity or (two.unit != "end" and two.count <= one.count):
            raise ValueError(
                f"prune_at must go on in time and in sparsity, since zeros only grow, but found {one.name} with "
                f"{one.sparsity:g} before {two.name} with {two.sparsity:g}"
            )
    return shots


def _parse_step(name: str, sparsity: float) -> PruningStep:
    unit, _, count = str(name).partition(":")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"prune_at: the sparsity at {name} must lie in [0, 1), but found {sparsity!r}")
    if name == "end":
        return PruningStep("end", 0, sparsity)
    if unit not in UNITS or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"prune_at must be {EXPECTED}, with K a whole number, at least 1, but found {name!r}")
    return PruningStep(unit, int(count), sparsity)
