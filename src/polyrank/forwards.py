"""The forwards that a micro-batch takes: one of all its samples, or one of each task's.

A sample belongs to one task and is computed without its neighbours. So whoever wants the tasks' gradients apart need
not go backward through the graph of all samples once for each task: every task's own samples, forward and backward,
give its gradient. Together that is the work of one ordinary step, and holds one task's activations at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from polyrank.corpus import Batch
from polyrank.models import MultiTaskModel
from polyrank.retaining import Retaining
from polyrank.train_state import Trainable
from polyrank.training import Training


@dataclass(frozen=True)
class Found:
    """What one forward gave."""

    sums: Tensor  # S_t (T,), for the log
    objective: Tensor  # S_t and what is added to it, (T,), with the graph
    auxiliary: Tensor  # the method's own losses, (), with their graph
    present: list[int]  # the tasks that have labels in it
    again: bool = False  # whether a later one needs this one's graph


class Forwards(ABC):
    """How a micro-batch goes through the model."""

    def __init__(
        self,
        model: MultiTaskModel,
        adapter: Trainable,
        retaining: Retaining | None,
        training: Training,
        meet: Callable[[], None],
    ) -> None:
        """meet: called before the processes exchange what a method's losses look at, once a micro-batch; may raise."""
        self.model, self.adapter, self.retaining, self.training, self.meet = model, adapter, retaining, training, meet

    @abstractmethod
    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        """Each forward, to be differentiated before the next one. counts: N_t (T,) of the micro-batch."""

    def run(self, batch: Batch, counts: Tensor) -> Found:
        """The samples of ``batch``, a micro-batch or a part of it; without auxiliary losses."""
        with autocast(self.model.device, self.training.precision):
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
        if self.adapter.hears != "nothing":
            self.meet()
        return sum(self.adapter.losses().values(), self._no_loss())

    def _no_loss(self) -> Tensor:
        return next(self.adapter.parameters()).new_zeros(())


class Whole(Forwards):
    """One forward of all samples."""

    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        yield replace(self.run(batch, counts), auxiliary=self.auxiliary())


class InStep(Forwards):
    """One forward of all samples, and a way backward for each task that any process has.

    Over a sharded base the processes meet in every block: each goes backward as often as the others, with a gradient of
    zero for a task of which it has no sample.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        adapter: Trainable,
        retaining: Retaining | None,
        training: Training,
        meet: Callable[[], None],
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """total: sums over the processes, in place."""
        super().__init__(model, adapter, retaining, training, meet)
        self.total = total

    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        found = self.run(batch, counts)
        everywhere = self.total(counts.to(self.model.device, copy=True))
        present = [task for task, count in enumerate(everywhere.tolist()) if count]
        # also of a task that has no sample here, and of losses that enter inside a block: it is there from its end on
        way = 0 * found.objective.sum()
        auxiliary = self.auxiliary()
        auxiliary = auxiliary + way if auxiliary.requires_grad else auxiliary
        yield replace(found, objective=found.objective + way, auxiliary=auxiliary, present=present)


class TaskByTask(Forwards):
    """One forward of each task's samples, where samples are computed without each other and it is less work.

    A method's own losses look at all samples. Where they look at sums over samples, those of the tasks are added, all
    graphs are kept, and the losses go backward through them once more. Else, and where activations are not to be kept
    (checkpointing), the losses take one more forward of all, to which the tasks' forwards add no notes.
    """

    @cached_property
    def mixes_samples(self) -> bool:
        return self.adapter.mixes_samples  # it goes through all modules, and may wait for the device

    def of(self, batch: Batch, counts: Tensor) -> Iterator[Found]:
        hears, live = self.adapter.hears, int((counts > 0).sum())
        if (
            hears == "sums" and self.training.checkpointing
        ):  # checkpointed graphs that are kept would be computed twice, and held
            hears = "batch"
        # forward and backward passes of all samples, those of the method's losses left out where both ways have them:
        # 1 + live in one forward; apart 2, or 3 with one more forward
        if self.mixes_samples or live <= (2 if hears == "batch" and not self.training.checkpointing else 1):
            yield replace(self.run(batch, counts), auxiliary=self.auxiliary())
            return
        parts = batch.by_task([task.name for task in self.model.tasks])
        if hears == "sums":
            with self.adapter.adding():
                found = [self.run(part, counts) for part in parts]
            auxiliary = self.auxiliary()
            yield from (replace(one, again=auxiliary.requires_grad) for one in found)
            yield self._only(auxiliary)
            return
        if hears == "batch":
            with autocast(self.model.device, self.training.precision):
                self.model(batch.inputs, batch.task_ids)
            yield self._only(self.auxiliary())
        for part in parts:
            with self.adapter.unheard() if hears == "batch" else nullcontext():
                one = self.run(part, counts)
            yield one

    def _only(self, auxiliary: Tensor) -> Found:
        """The method's own losses, of no task."""
        none = self._no_loss().expand(len(self.model.tasks))
        return Found(none, none, auxiliary, [])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
