"""How much there is to compute in the papers' zero-shot tasks."""

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class TaskSize:
    """A task as lm-eval asks it, without solved examples.

    Args:
        documents: Questions of the split that is measured.
        sequences: What goes through the model for them. Answers of one token that follow the same text share one.
        tokens: In all sequences.
        longest: In the longest one.
    """

    documents: int
    sequences: int
    tokens: int
    longest: int

    def first(self, limit: int | None) -> "TaskSize":
        """The same of so many documents at most, as they are on average."""
        if limit is None or limit >= self.documents:
            return self
        share = limit / self.documents
        return TaskSize(limit, ceil(self.sequences * share), ceil(self.tokens * share), self.longest)


# Counted with SmolLM2's tokenizer, by `tests/estimate/test_tasks.py`; another one's differ by some per cent.
TASKS = {
    "boolq": TaskSize(3270, 3270, 495_135, 1298),
    "rte": TaskSize(277, 277, 21_929, 277),
    "hellaswag": TaskSize(10_042, 40_145, 3_133_238, 153),
    "winogrande": TaskSize(1267, 2534, 54_426, 38),
    "arc_easy": TaskSize(2376, 7883, 249_161, 162),
    "arc_challenge": TaskSize(1172, 4250, 156_157, 174),
    "openbookqa": TaskSize(500, 1536, 21_983, 73),
}
