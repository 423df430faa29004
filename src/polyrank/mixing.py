"""Mixing: which examples of which tasks make up step n.

The sample drawn at step n is a pure function of (seed, n): resuming is one integer, and the parts of a step (processes,
micro-batches) are disjoint slices of the same list, so that splitting a step differently changes no arithmetic.

Short texts waste padding beside long ones, so a step is sorted by length before it is cut into parts. Sorting over a
window of several steps saves more padding, but where tasks differ in length it makes every step nearly one task's:
the window is 1 unless told.
"""

import bisect
import itertools
import math
import random
from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pick = tuple[int, int]  # (index of the task, index of the example in its task)


class Sampler(Protocol):
    """What draws a step. `part` of `parts` is one disjoint slice of the step; `smallest`: examples of the smallest."""

    smallest: int

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
        self.smallest = len(self.picks) // self.steps_per_epoch
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


class Weighted:
    """Tasks drawn with given weights, examples uniformly, both with replacement.

    With `one_task` all examples of a step are of one task, drawn once for the step.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        weights: Sequence[float],
        one_task: bool = False,
        window: int = 1,
    ) -> None:
        """weights[t] >= 0, in any unit; a task without examples is never drawn."""
        _check(lengths, batch_size, window)
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.one_task, self.smallest = one_task, batch_size
        alive = [weight if of_task else 0.0 for weight, of_task in zip(weights, lengths, strict=True)]
        self.cumulative = list(itertools.accumulate(alive))
        self._last: tuple[int, list[list[Pick]]] = (-1, [])

    def batch(self, step: int, part: int = 0, parts: int = 1) -> list[Pick]:
        number, position = divmod(step, self.window)
        if self._last[0] != number:
            self._last = (number, self._window(number))
        return _slice(self._last[1][position], part, parts)

    def _task(self, rng: random.Random) -> int:
        return bisect.bisect_right(self.cumulative, rng.random() * self.cumulative[-1])

    def _window(self, number: int) -> list[list[Pick]]:
        rng = random.Random(f"{self.seed}/{number}")
        if self.one_task:
            tasks = [task for task in (self._task(rng) for _ in range(self.window)) for _ in range(self.batch_size)]
        else:
            tasks = [self._task(rng) for _ in range(self.window * self.batch_size)]
        picks = [(task, rng.randrange(len(self.lengths[task]))) for task in tasks]
        if self.one_task:  # sorting over the window would mix them again
            steps = [picks[k : k + self.batch_size] for k in range(0, len(picks), self.batch_size)]
            return [_cut(step, (0, len(step)), self.lengths, rng)[0] for step in steps]
        return _cut(picks, range(0, len(picks) + 1, self.batch_size), self.lengths, rng)


class InSequence:
    """One task after the other, in their order: in stage t, every example of task t once per epoch of the stage."""

    def __init__(
        self, lengths: Sequence[Sequence[int]], batch_size: int, seed: int, stages: Sequence[range], window: int = 1
    ) -> None:
        """stages[t]: the steps of task t.

        Raises:
            ValueError: a task has no example for its stage.
        """
        if not all(lengths):
            empty = [t for t, of_task in enumerate(lengths) if not of_task]
            raise ValueError(f"tasks number {empty} have no example for their stages: give training data, or leave out")
        self.stages = stages
        alone = [[of_task if u == t else [] for u, of_task in enumerate(lengths)] for t in range(len(lengths))]
        self.samplers = [Proportional(only, batch_size, seed, window) for only in alone]
        self.smallest = min(sampler.smallest for sampler in self.samplers)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> list[Pick]:
        stage = stage_of(step, self.stages)
        return self.samplers[stage].batch(step - self.stages[stage].start, part, parts)


def stage_of(step: int, stages: Sequence[range]) -> int:
    return next(j for j, stage in enumerate(stages) if step in stage)


class Mixing(BaseModel):
    """How steps draw from the tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampling: Literal["proportional", "temperature", "uniform", "exponential"] = Field(
        default="proportional",
        description="proportional: every example once per epoch. The others draw tasks: by size^(1/temperature), "
        "equally, or by exp(share of the examples), as MoRE does",
    )
    temperature: float = Field(default=2.0, ge=1, description="of sampling: temperature; 1 is proportional")
    batches: Literal["mixed", "one_task"] = Field(
        default="mixed", description="one_task: all examples of a step are of one task"
    )
    length_window: int = Field(
        default=1, ge=1, description="steps over which texts are grouped by length: less padding, less mixing"
    )

    order: Literal["together", "sequence"] = Field(
        default="together",
        description="sequence: one task after the other, in the recipe's order, each with an equal share of the steps",
    )

    @model_validator(mode="after")
    def _takes_turns(self) -> "Mixing":
        if self.order == "sequence" and (self.sampling != "proportional" or self.batches != "mixed"):
            raise ValueError(
                "order: sequence trains on one task at a time, so that nothing is drawn from several: leave out "
                "`sampling` and `batches`"
            )
        return self

    def stages(self, steps: int, tasks: int) -> list[range]:
        """The steps of each task in turn; one stage of all steps where tasks are trained together.

        Raises:
            ValueError: fewer steps than tasks.
        """
        if self.order == "together":
            return [range(steps)]
        if steps < tasks:
            raise ValueError(f"{steps} steps for {tasks} tasks in sequence: give each at least one, raise steps")
        return [range(t * steps // tasks, (t + 1) * steps // tasks) for t in range(tasks)]

    def sampler(self, lengths: Sequence[Sequence[int]], batch_size: int, seed: int, steps: int = 0) -> Sampler:
        """The sampler of these settings; lengths[t][i]: tokens of example i of task t; steps: of the whole training,
        which tasks in sequence share.

        Raises:
            ValueError: no task has an example, or in sequence, one task has none.
        """
        if self.order == "sequence":
            stages = self.stages(steps, len(lengths))
            return InSequence(lengths, batch_size, seed, stages, self.length_window)
        if self.sampling == "proportional" and self.batches == "mixed":
            return Proportional(lengths, batch_size, seed, self.length_window)
        sizes = [len(of_task) for of_task in lengths]
        weights = {
            "proportional": [float(size) for size in sizes],
            "temperature": [size ** (1 / self.temperature) for size in sizes],
            "uniform": [1.0] * len(sizes),
            "exponential": [math.exp(size / max(1, sum(sizes))) for size in sizes],
        }[self.sampling]
        return Weighted(lengths, batch_size, seed, weights, self.batches == "one_task", self.length_window)


def _check(lengths: Sequence[Sequence[int]], batch_size: int, window: int) -> None:
    if not any(lengths):
        raise ValueError("no task has an example to draw: give training data")
    if batch_size < 1 or window < 1:
        raise ValueError(f"batch_size {batch_size} and window {window} must be at least 1")
