"""Mixing: which examples of which tasks make up step n, and how they become one padded batch.

The sample drawn at step n is a pure function of (seed, n): resuming is one integer, and the parts of a step (processes,
micro-batches) are disjoint slices of the same list, so that splitting a step differently changes no arithmetic.

Short texts waste padding beside long ones, so a step is sorted by length before it is cut into parts. Sorting over a
window of several steps saves more padding, but where tasks differ in length it makes every step nearly one task's:
the window is 1 unless told.
"""

import bisect
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from polyrank.tasks import Examples, Task, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pick = tuple[int, int]  # (index of the task, index of the example in its task)


class Sampler(Protocol):
    """What draws a step. `part` of `parts` is one disjoint slice of the step."""

    def batch(self, step: int, part: int = 0, parts: int = 1) -> list[Pick]: ...


def _slice(batch: list[Pick], part: int, parts: int) -> list[Pick]:
    if not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts}: parts are counted from 0")
    return batch[part * len(batch) // parts : (part + 1) * len(batch) // parts]


def _cut(
    picks: list[Pick], bounds: Sequence[int], lengths: Sequence[Sequence[int]], rng: random.Random
) -> list[list[Pick]]:
    """One window: sorted by length, cut into batches at the bounds, and the batches shuffled."""
    picks = sorted(picks, key=lambda pick: -lengths[pick[0]][pick[1]])  # stable: ties keep the random order
    batches = [picks[a:b] for a, b in itertools.pairwise(bounds)]
    rng.shuffle(batches)
    return batches


class Proportional:
    """Every example of every task once per epoch, so that tasks occur in proportion to their sizes.

    An epoch is ceil(N / batch_size) batches whose sizes differ by at most one: no small last batch.
    """

    def __init__(self, lengths: Sequence[Sequence[int]], batch_size: int, seed: int, window: int = 1) -> None:
        """lengths[t][i]: tokens of example i of task t; batch_size: examples of one whole step, over all processes."""
        _check(lengths, batch_size, window)
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.picks = [(t, i) for t, of_task in enumerate(lengths) for i in range(len(of_task))]
        self.steps_per_epoch = -(-len(self.picks) // batch_size)
        self._last: tuple[int, list[list[Pick]]] = (-1, [])  # only saves time: an epoch is a function of its number

    def batch(self, step: int, part: int = 0, parts: int = 1) -> list[Pick]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._last[0] != epoch:
            self._last = (epoch, self._epoch(epoch))
        return _slice(self._last[1][position], part, parts)

    def _epoch(self, epoch: int) -> list[list[Pick]]:
        rng = random.Random(f"{self.seed}/{epoch}")
        picks = rng.sample(self.picks, len(self.picks))
        total = self.steps_per_epoch
        bounds = [k * len(picks) // total for k in range(total + 1)]
        batches: list[list[Pick]] = []
        for first in range(0, total, self.window):
            own = bounds[first : first + self.window + 1]
            batches += _cut(picks[own[0] : own[-1]], [b - own[0] for b in own], self.lengths, rng)
        return batches


class Tempered:
    """Tasks drawn with probability proportional to size ** (1 / temperature), examples uniformly, with replacement.

    temperature 1 draws in proportion to the sizes; a large temperature (float("inf") too) draws tasks uniformly.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], batch_size: int, seed: int, temperature: float, window: int = 1
    ) -> None:
        _check(lengths, batch_size, window)
        if not temperature >= 1:
            raise ValueError(f"temperature {temperature}: give 1 (proportional) or more (towards uniform)")
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        weights = [len(of_task) ** (1 / temperature) if of_task else 0.0 for of_task in lengths]
        self.cumulative = [sum(weights[: k + 1]) for k in range(len(weights))]
        self._last: tuple[int, list[list[Pick]]] = (-1, [])

    def batch(self, step: int, part: int = 0, parts: int = 1) -> list[Pick]:
        number, position = divmod(step, self.window)
        if self._last[0] != number:
            self._last = (number, self._window(number))
        return _slice(self._last[1][position], part, parts)

    def _window(self, number: int) -> list[list[Pick]]:
        rng = random.Random(f"{self.seed}/{number}")
        picks: list[Pick] = []
        for _ in range(self.window * self.batch_size):
            task = bisect.bisect_right(self.cumulative, rng.random() * self.cumulative[-1])
            picks.append((task, rng.randrange(len(self.lengths[task]))))
        bounds = range(0, len(picks) + 1, self.batch_size)
        return _cut(picks, bounds, self.lengths, rng)


def _check(lengths: Sequence[Sequence[int]], batch_size: int, window: int) -> None:
    if not any(lengths):
        raise ValueError("no task has an example to draw: give training data")
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size {batch_size} and window {window} must be at least 1")


@dataclass(frozen=True)
class Batch:
    """inputs: input_ids and attention_mask (B, L); task_ids (B,); labels (B,), -100 where missing."""

    inputs: dict[str, Tensor]
    task_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        return Batch(inputs, self.task_ids.to(device), self.labels.to(device))


def tokenize(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text, cut at max_length, not padded."""
    if not texts:
        return []
    return tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]


class Corpus:
    """Examples of several tasks, tokenized once; `collate` turns picks into a padded batch."""

    def __init__(self, tokens: list[list[list[int]]], labels: list[list[int]], pad_id: int, pad_left: bool) -> None:
        """tokens[t][i]: ids of example i of task t; labels[t][i]: its label id."""
        self.tokens, self.labels, self.pad_id, self.pad_left = tokens, labels, pad_id, pad_left
        self.lengths = [[len(ids) for ids in of_task] for of_task in tokens]

    @classmethod
    def of(
        cls,
        tasks: Sequence[Task],
        splits: Mapping[str, Examples],
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
    ) -> "Corpus":
        """The examples `splits[task.name]`; a task without an entry has none."""
        examples = [splits.get(task.name, Examples()) for task in tasks]
        tokens = [tokenize(tokenizer, e.texts, max_length) for e in examples]
        labels = [task.ids(e) for task, e in zip(tasks, examples, strict=True)]
        return cls(tokens, labels, pad_id(tokenizer), tokenizer.padding_side == "left")

    def by_length(self, batch_size: int) -> list[list[Pick]]:
        """Every example once, the longest batches first, tasks mixed: for inference."""
        picks = [(t, i) for t, of_task in enumerate(self.tokens) for i in range(len(of_task))]
        picks.sort(key=lambda pick: -self.lengths[pick[0]][pick[1]])
        return [picks[k : k + batch_size] for k in range(0, len(picks), batch_size)]

    def collate(self, picks: Sequence[Pick]) -> Batch:
        """Padded to the longest of the batch, on the tokenizer's side."""
        rows = [self.tokens[t][i] for t, i in picks]
        width = max(1, *(len(row) for row in rows))
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for k, row in enumerate(rows):
            place = slice(width - len(row), width) if self.pad_left else slice(0, len(row))
            ids[k, place] = torch.tensor(row, dtype=torch.long)
            mask[k, place] = 1
        task_ids = torch.tensor([t for t, _ in picks])
        labels = torch.tensor([self.labels[t][i] for t, i in picks])
        return Batch({"input_ids": ids, "attention_mask": mask}, task_ids, labels)
