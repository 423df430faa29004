"""What forwards say of each task's own loss, and its mean over a window of steps. T tasks, B samples, V classes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from polyrank.tasks.base import MISSING


class Losses(NamedTuple):
    """Of the labels of one row, flat: their losses, the task of each, and whether it is a label at all."""

    values: Tensor
    task_ids: Tensor
    valid: Tensor


class TaskLosses:
    """Sums of the losses of each task's labels, and how many they are; adding to them never waits for the device."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.totals: Tensor | None = None  # (2, T + 1): sums and counts; the last column is the auxiliary losses'

    @torch.no_grad()
    def add(self, rows: Sequence[Losses], auxiliary: Tensor | None = None) -> None:
        """One forward."""
        for values, ids, valid in rows:
            totals = self._totals(values.device)
            totals[0].index_add_(0, ids, values.double() * valid)
            totals[1].index_add_(0, ids, valid.double())
        if auxiliary is not None:
            totals = self._totals(auxiliary.device)
            totals[0, -1] += auxiliary
            totals[1, -1] += 1

    def take(self, accelerator: Accelerator, prefix: str = "") -> dict[str, float]:
        """The means since the last call, over all processes; nothing for a task that had no label."""
        totals, self.totals = self._totals(accelerator.device), None
        everywhere: Any = accelerator.reduce(totals, "sum")
        sums, counts = everywhere.tolist()
        names = [*(f"{prefix}loss_{task}" for task in self.tasks), f"{prefix}auxiliary"]
        return {name: total / n for name, total, n in zip(names, sums, counts, strict=True) if n}

    def _totals(self, device: torch.device) -> Tensor:
        if self.totals is None:
            self.totals = torch.zeros(2, len(self.tasks) + 1, dtype=torch.float64, device=device)
        return self.totals


@torch.no_grad()
def losses_of(
    output: Any, labels: Tensor | None, task_ids: Tensor, *, shifts: bool, problem: str | None
) -> list[Losses]:
    """The losses of a batch's labels, row by row: one row's softmax in memory at a time.

    Args:
        output: a model's, with ``logits``, or with TRL's ``log_probs``.
        labels: (B,), (B, L) or, for several numbers or labels a sample, (B, V).
        task_ids: (B,) or (B, L).
        shifts: whether logits are those of the next token.
        problem: ``config.problem_type``.

    Nothing where there are no labels, or logits and labels do not go together.
    """
    if labels is None or not isinstance(output, Mapping) or task_ids.ndim > labels.ndim:
        return []
    ids = task_ids if task_ids.ndim == labels.ndim else task_ids.view(-1, *[1] * (labels.ndim - 1)).expand_as(labels)
    taken, logits = output.get("log_probs"), output.get("logits")
    if isinstance(taken, Tensor):  # (B, L - 1)
        first = labels.shape[1] - taken.shape[1]
        rows = zip(-taken, ids[:, first:], labels[:, first:] != MISSING, strict=True)
        return [Losses(*row) for row in rows]
    if not isinstance(logits, Tensor):
        return []
    if shifts:
        logits, labels, ids = logits[:, :-1], labels[:, 1:], ids[:, 1:]
    if labels.is_floating_point():
        same = logits.reshape(len(logits), -1).shape == labels.reshape(len(labels), -1).shape
        return [_of_numbers(*row, problem) for row in zip(logits, labels, ids, strict=True)] if same else []
    if logits.shape[:-1] != labels.shape:
        return []
    return [_of_classes(*row) for row in zip(logits, labels, ids, strict=True)]


def _of_classes(logits: Tensor, labels: Tensor, ids: Tensor) -> Losses:
    labels = labels.reshape(-1)
    values = F.cross_entropy(logits.float().reshape(len(labels), -1), labels, ignore_index=MISSING, reduction="none")
    return Losses(values, ids.reshape(-1), labels != MISSING)


def _of_numbers(logits: Tensor, labels: Tensor, ids: Tensor, problem: str | None) -> Losses:
    """Squared errors; of several labels a sample, binary cross-entropies."""
    found, wanted = logits.float().reshape(-1), labels.float().reshape(-1)
    if problem == "multi_label_classification":
        values = F.binary_cross_entropy_with_logits(found, wanted, reduction="none")
    else:
        values = (found - wanted).square()
    return Losses(values, ids.reshape(-1), torch.ones_like(values, dtype=torch.bool))
