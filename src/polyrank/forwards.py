"""The forwards that a micro-batch takes: one of all its samples, or one of each task's.

A sample belongs to one task and is computed without its neighbours. So whoever wants the tasks' gradients apart need
not go backward through the graph of all samples once for each task: every task's own samples, forward and backward,
give its gradient. Together that is the work of one ordinary step, and holds one task's activations at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyrank.corpus import Batch
from polyrank.models import MultiTaskModel
from polyrank.retaining import Retaining
from polyrank.train_state import Trainable


@dataclass(frozen=True)
class Found:
    """What one forward gave."""

    sums: Tensor  # S_t (T,), for the log
    objective: Tensor  # S_t and what is added to it, (T,), with the graph
    auxiliary: Tensor  # the method's own losses, (), with their graph
    present: list[int]  # the tasks that have labels in it


class Forwards(ABC):
    """How a micro-batch goes through the model."""

    def __init__(self, model: MultiTaskModel, adapter: Trainable, retaining: Retaining | None, precision: str) -> None:
        self.model, self.adapter, self.retaining, self.precision = model, adapter, retaining, precision

    @abstractmethod
    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        """Each forward, to be differentiated before the next one. counts: N_t (T,) of the micro-batch."""

    def run(self, batch: Batch, counts: Tensor) -> Found:
        """The samples of ``batch``, a micro-batch or a part of it; without auxiliary losses."""
        with autocast(self.model.device, self.precision):
            answers = self.model(batch.inputs, batch.task_ids)
        sums = self.model.loss_sums(answers, batch.labels)  # (T,)
        objective = sums
        if self.retaining is not None:
            means = sums.detach() / counts.to(sums).clamp(min=1)
            objective = sums + self.retaining.penalties(answers, batch.labels, means)
        present = [task for task in batch.task_ids.unique().tolist() if counts[task]]
        return Found(sums.detach(), objective, self._no_loss(), present)

    def auxiliary(self) -> Tensor:
        """The sum () of the losses of which the last forward left notes."""
        return sum(self.adapter.losses().values(), self._no_loss())

    def _no_loss(self) -> Tensor:
        return next(self.adapter.parameters()).new_zeros(())


class Whole(Forwards):
    """One forward of all samples."""

    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        yield replace(self.run(batch, counts), auxiliary=self.auxiliary())


class TaskByTask(Forwards):
    """One forward of each task's samples, where samples are computed without each other and it is less work.

    A method's own losses look at all samples together. They take one more forward and backward pass of all, to which
    the tasks' forwards leave no notes: twice the work of an ordinary step, whatever the number of tasks.
    """

    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        heard = self.adapter.has_losses
        # passes through all samples: with one forward, 1 and one for each task (and the method's losses); apart, 2 (4)
        if self.adapter.mixes_samples or int((counts > 0).sum()) <= (2 if heard else 1):
            yield replace(self.run(batch, counts), auxiliary=self.auxiliary())
            return
        if heard:
            yield self._of_the_method(batch)
        for part in batch.by_task([task.name for task in self.model.tasks]):
            with self.adapter.unheard() if heard else nullcontext():
                found = self.run(part, counts)
            yield found

    def _of_the_method(self, batch: Batch) -> Found:
        """Of all samples, the method's own losses alone."""
        with autocast(self.model.device, self.precision):
            self.model(batch.inputs, batch.task_ids)
        none = self._no_loss().expand(len(self.model.tasks))
        return Found(none, none, self.auxiliary(), [])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
