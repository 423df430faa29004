"""Tasks one after the other: what was learnt, and what was lost again.

R[j][i]: the score on task i after task j was trained, for T tasks
average               mean over i of R[T-1][i]
forgetting of i < T-1  max over j < T-1 of R[j][i], minus R[T-1][i]     (Chaudhry et al., ECCV 2018)
backward transfer     mean over i < T-1 of R[T-1][i] - R[i][i]          (Lopez-Paz and Ranzato, NeurIPS 2017)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Forgetting:
    """The tasks in the order of their training, and R (T, T): one row for each task as it was over."""

    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the scores are not T rows of T.
        """
        sizes = {len(self.scores), *(len(row) for row in self.scores)}
        if not self.tasks or sizes != {len(self.tasks)}:
            raise ValueError(f"{len(self.tasks)} tasks need as many rows of as many scores, one row after each task")

    @property
    def average(self) -> float:
        """The mean of the last row."""
        return fmean(self.scores[-1])

    @property
    def forgetting(self) -> tuple[float, ...]:
        """How far each task but the last fell from the best score it had before the end; below 0 where it rose."""
        before, last = self.scores[:-1], self.scores[-1]
        return tuple(max(row[i] for row in before) - last[i] for i in range(len(before)))

    @property
    def mean_forgetting(self) -> float:
        """The mean over all tasks but the last; 0 for one task."""
        return fmean(self.forgetting) if len(self.tasks) > 1 else 0.0

    @property
    def backward_transfer(self) -> float:
        """What the later tasks did to each task but the last since it was over, on average; 0 for one task."""
        changes = [self.scores[-1][i] - self.scores[i][i] for i in range(len(self.tasks) - 1)]
        return fmean(changes) if changes else 0.0

    def as_json(self) -> dict[str, Any]:
        """The matrix and what follows from it."""
        return {
            "tasks": list(self.tasks),
            "scores": [list(row) for row in self.scores],
            "average": self.average,
            "forgetting": dict(zip(self.tasks, self.forgetting, strict=False)),
            "mean_forgetting": self.mean_forgetting,
            "backward_transfer": self.backward_transfer,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Forgetting":
        """The inverse of ``as_json``."""
        return cls(tuple(content["tasks"]), tuple(tuple(row) for row in content["scores"]))

    def __str__(self) -> str:
        """The matrix in percent, as a Markdown table."""
        lines = [f"| after | {' | '.join(self.tasks)} |", f"|---|{'---|' * len(self.tasks)}"]
        for name, row in zip(self.tasks, self.scores, strict=True):
            lines.append(f"| {name} | {' | '.join(f'{100 * score:.1f}' for score in row)} |")
        lost = [f"{100 * one:.1f}" for one in self.forgetting]
        return "\n".join([*lines, f"| forgotten | {' | '.join([*lost, ''])} |"])
