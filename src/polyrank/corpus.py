"""Corpora: the examples of several tasks, tokenized once, and the batches made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.mixing import Pick
from polyrank.reader import OF_THE_BATCH, Reader
from polyrank.tasks import Examples, Row, Task


@dataclass(frozen=True)
class Batch:
    """inputs: what the reader's `collate` says; task_ids (B,); labels: for each task that occurs, (n, ...)."""

    inputs: dict[str, Tensor]
    task_ids: Tensor
    labels: dict[str, Tensor]

    def to(self, device: torch.device) -> "Batch":
        inputs, labels = ({key: x.to(device) for key, x in group.items()} for group in (self.inputs, self.labels))
        return Batch(inputs, self.task_ids.to(device), labels)

    def by_task(self, names: Sequence[str]) -> "list[Batch]":
        """A batch for each task that occurs; names: of all tasks. The padding stays: each row is computed as it was."""
        parts = []
        for task, name in enumerate(names):
            rows = (self.task_ids == task).nonzero().squeeze(1)
            if len(rows):
                inputs = {key: x if key in OF_THE_BATCH else x[rows] for key, x in self.inputs.items()}
                parts.append(Batch(inputs, self.task_ids[rows], {name: self.labels[name]}))
        return parts


class Corpus:
    """Rows of tasks; `collate` turns picks into a padded batch."""

    def __init__(self, tasks: Sequence[Task], rows: Sequence[Sequence[Row]], reader: Reader) -> None:
        """rows[t][i]: row i of task t."""
        self.tasks, self.rows, self.reader = tuple(tasks), rows, reader
        self.lengths = [[reader.length(row) for row in of_task] for of_task in rows]

    @classmethod
    def of(cls, tasks: Sequence[Task], splits: Mapping[str, Examples], reader: Reader) -> "Corpus":
        """Rows to train on, one for each example of `splits[task.name]`; a task without an entry has none."""
        return cls(tasks, [task.rows(splits.get(task.name, Examples()), reader) for task in tasks], reader)

    @classmethod
    def to_score(cls, tasks: Sequence[Task], splits: Mapping[str, Examples], reader: Reader) -> "Corpus":
        """Rows to score: multiple choice has one for each option."""
        return cls(tasks, [task.candidates(splits.get(task.name, Examples()), reader) for task in tasks], reader)

    def by_length(self, batch_size: int) -> list[list[Pick]]:
        """Every row once, the longest batches first, tasks mixed: for inference."""
        picks = [(t, i) for t, of_task in enumerate(self.rows) for i in range(len(of_task))]
        picks.sort(key=lambda pick: -self.lengths[pick[0]][pick[1]])
        return [picks[k : k + batch_size] for k in range(0, len(picks), batch_size)]

    def of_tasks(self, picks: Sequence[Pick]) -> dict[str, list[Row]]:
        """The picked rows of each task that occurs, in their order."""
        out: dict[str, list[Row]] = {}
        for t, i in picks:
            out.setdefault(self.tasks[t].name, []).append(self.rows[t][i])
        return out

    def collate(self, picks: Sequence[Pick]) -> Batch:
        """Padded to the longest of the batch."""
        named = {task.name: task for task in self.tasks}
        labels = {name: named[name].labels(rows) for name, rows in self.of_tasks(picks).items()}
        inputs = self.reader.collate([self.rows[t][i] for t, i in picks])
        return Batch(inputs, torch.tensor([t for t, _ in picks]), labels)
