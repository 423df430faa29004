"""The task of each row, from a column of the data set to a keyword of the model. B rows, L tokens."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Row = Mapping[str, Any]


class TaskCollator:
    """Any collator, with the tasks of its rows beside the batch it makes.

    A row names its task, or gives its id: its position in ``tasks``. The batch gets a LongTensor (B,). Where the inner
    collator joins all rows into one (TRL's ``padding_free``) it gets (1, L), an id for each token. A row that was
    packed before has a list of tasks, and as many lengths in "seq_lengths".
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        tasks: Sequence[str],
        column: str = "task",
        keyword: str = "task_ids",
    ) -> None:
        """keyword: the model's name for the ids; "task_id" for a model of PEFT, which swallows "task_ids"."""
        self.collator, self.tasks, self.column, self.keyword = collator, tuple(tasks), column, keyword

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """
        Raises:
            ValueError: a row without a task, or with one that is not known; with the row and the cure.
        """
        found = [self._pieces(place, row) for place, row in enumerate(rows)]
        batch = self.collator([{key: value for key, value in row.items() if key != self.column} for row in rows])
        batch[self.keyword] = self._ids(batch, rows, found)
        return batch

    def _pieces(self, place: int, row: Row) -> list[int]:
        """The ids of a row: one, or those of the texts that were packed into it."""
        if self.column not in row:
            raise ValueError(
                f"row {place} of a batch has no column {self.column!r}, only {', '.join(sorted(row))}: name the column "
                "with task_column=, and keep it up to the collator (a Trainer drops what the model does not take, "
                "unless it is a PolyrankTrainerMixin or has remove_unused_columns=False; TRL's packing drops it "
                "always, so set packing=False)"
            )
        value = row[self.column]
        if not isinstance(value, list):
            return [self._id(place, value)]
        if len(value) != len(row.get("seq_lengths", ())):
            raise ValueError(
                f"row {place} of a batch has {len(value)} tasks and {len(row.get('seq_lengths', ()))} seq_lengths: a "
                "packed row needs one of each for every text in it"
            )
        return [self._id(place, one) for one in value]

    def _id(self, place: int, value: Any) -> int:
        known = ", ".join(self.tasks)
        if isinstance(value, str):
            if value in self.tasks:
                return self.tasks.index(value)
            near = difflib.get_close_matches(value, self.tasks, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"row {place} of a batch: unknown task {value!r}. {hint}The adapter's tasks are {known}: mend the "
                f"column {self.column!r}, or adapt() the model with this task too"
            )
        try:
            number = -1 if isinstance(value, bool) else int(value)
        except (TypeError, ValueError):
            number = -1
        if number != value or not 0 <= number < len(self.tasks):
            raise ValueError(
                f"row {place} of a batch: {value!r} in the column {self.column!r} is no task: give a name ({known}) or "
                f"an id from 0 to {len(self.tasks) - 1}"
            )
        return number

    def _ids(self, batch: Mapping[str, Any], rows: Sequence[Row], found: list[list[int]]) -> Tensor:
        sizes = {key: value.shape for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        packed = any(isinstance(row[self.column], list) for row in rows)
        first = next(iter(sizes.values()), torch.Size())
        if not packed and first[:1] == (len(rows),) and not (len(rows) == 1 and "cu_seq_lens_q" in batch):
            return torch.tensor([ids[0] for ids in found])
        lengths = [
            row["seq_lengths"] if isinstance(row[self.column], list) else [len(row["input_ids"])]
            for row in rows
            if "input_ids" in row
        ]
        tokens = sizes.get("input_ids", torch.Size())
        total = sum(chain.from_iterable(lengths))
        if len(tokens) != 2 or tokens[0] != 1 or not 0 < total <= tokens[1]:
            raise ValueError(
                f"{len(rows)} rows became a batch of {dict(sizes)}, so that no task can be told for its samples: give "
                "a collator that keeps rows apart, or joins all of them into one without cutting any"
            )
        ids = torch.tensor([*chain.from_iterable(found)]).repeat_interleave(
            torch.tensor([*chain.from_iterable(lengths)])
        )
        return torch.cat([ids, ids[-1:].expand(tokens[1] - total)]).unsqueeze(0)  # padding goes with the last text
