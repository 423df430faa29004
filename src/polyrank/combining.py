"""How the losses of a step become gradients, and a combiner at work: what it is asked, and what it makes of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from polyrank.combine import Combiner, State, Step


class Combination:
    """A combiner, its memory, and its last answer."""

    def __init__(self, combiner: Combiner, tasks: Sequence[str], seed: int) -> None:
        self.combiner, self.tasks, self.seed = combiner, tuple(tasks), seed
        self.state: State = {}
        self.last: tuple[Step, Tensor] | None = None

    def ask(self, number: int, live: Tensor, losses: Tensor | None = None, gram: Tensor | None = None) -> Tensor:
        """w (T,) for the step ``number``. live (T,); losses (T,) and gram (T, T) where the combiner needs them."""
        given = [None if one is None else one.detach().cpu().double() for one in (losses, gram)]
        step = Step(self.tasks, live.cpu(), number, self.seed, *given)
        weights = self.combiner.weights(step, self.state)
        self.last = step, weights
        return weights

    def after(self, losses: Tensor) -> None:
        """The step was taken; ``losses`` (T,) as the combiner wants them."""
        assert self.last is not None
        self.combiner.after(self.last[0], losses.detach().cpu().double(), self.state)

    def scored(self, scores: Mapping[str, float]) -> None:
        self.combiner.scored(scores, self.state)

    def numbers(self) -> dict[str, Any]:
        """For the log: each task's weight and, of gradients, the cosine of each pair of live tasks."""
        if self.last is None:
            return {}
        step, weights = self.last
        found: dict[str, Any] = {"weights": dict(zip(self.tasks, weights.tolist(), strict=True))}
        if step.gram is not None:
            norms = step.gram.diagonal().clamp_min(0).sqrt()
            cosines = (step.gram / (norms.outer(norms)).clamp_min(torch.finfo(norms.dtype).tiny)).tolist()
            alive = [i for i in range(len(self.tasks)) if step.live[i] and norms[i].isfinite()]
            found["cosines"] = {
                self.tasks[i]: {self.tasks[j]: cosines[i][j] for j in alive if j > i} for i in alive[:-1]
            }
        return found


class Pass(ABC):
    """How the losses of a step's micro-batches become gradients. counts: N_t (T,) of the whole step, all processes."""

    @abstractmethod
    def add(self, sums: Tensor, auxiliary: Tensor, present: Sequence[int], again: bool = False) -> None:
        """S_t (T,) of one forward with its graph, a method's own losses, and the tasks that have labels in it.

        again: a later one goes through this graph too.
        """

    @abstractmethod
    def finish(self, means: Tensor) -> Tensor:
        """After the last micro-batch, with L_t (T,) of the whole step: what S_t counts for in its loss, (T,)."""


class Known(Pass):
    """What each task counts for is known before the first forward: one backward pass for a micro-batch."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors  # (T,)

    def add(self, sums: Tensor, auxiliary: Tensor, present: Sequence[int], again: bool = False) -> None:
        ((sums * self.factors).sum() + auxiliary).backward()

    def finish(self, means: Tensor) -> Tensor:
        return self.factors


class AfterForward(Pass):
    """A step of one micro-batch, whose own forward tells the losses that a combiner needs."""

    def __init__(self, combination: Combination, number: int, counts: Tensor) -> None:
        self.combination, self.number, self.counts = combination, number, counts
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, sums: Tensor, auxiliary: Tensor, present: Sequence[int], again: bool = False) -> None:
        self.waiting.append((sums, auxiliary))

    def finish(self, means: Tensor) -> Tensor:
        ((sums, auxiliary),) = self.waiting
        weights = self.combination.ask(self.number, self.counts > 0, means)
        factors = weights.to(means) / self.counts.clamp(min=1)
        ((sums * factors).sum() + auxiliary).backward()
        return factors


class Apart(Pass):
    """The gradients of each task on the shared weights, kept apart; a combiner weighs them at the end of the step.

    Weights that are one task's own get the gradient of the mean of the live tasks' losses, and all of them that of the
    auxiliary losses, which are of no task.
    """

    def __init__(
        self,
        combination: Combination,
        number: int,
        counts: Tensor,
        shared: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        accelerator: Accelerator,
    ) -> None:
        self.combination, self.number, self.counts, self.accelerator = combination, number, counts, accelerator
        self.shared, self.others = list(shared), list(others)
        self.stacks = [p.new_zeros(len(counts), *p.shape) for p in shared]  # (T, ...)

    def add(self, sums: Tensor, auxiliary: Tensor, present: Sequence[int], again: bool = False) -> None:
        every = [*self.shared, *self.others]
        for task in present:
            loss = sums[task] / self.counts[task]
            keep = again or task != present[-1] or auxiliary.requires_grad
            grads = torch.autograd.grad(loss, every, retain_graph=keep, allow_unused=True)
            for stack, grad in zip(self.stacks, grads, strict=False):
                if grad is not None:
                    stack[task] += grad
            share = 1 / int((self.counts > 0).sum())
            _accumulate(self.others, [None if g is None else g * share for g in grads[len(self.shared) :]])
        if auxiliary.requires_grad:
            _accumulate(every, torch.autograd.grad(auxiliary, every, allow_unused=True))

    def finish(self, means: Tensor) -> Tensor:
        if self.accelerator.num_processes > 1:  # first the sum: a combination of parts is no part of the combination
            flat = torch.cat([stack.reshape(-1) for stack in self.stacks])
            torch.distributed.all_reduce(flat)
            parts = flat.split([stack.numel() for stack in self.stacks])
            self.stacks = [part.view_as(stack) for part, stack in zip(parts, self.stacks, strict=True)]
        gram = self.counts.new_zeros(len(self.counts), len(self.counts), dtype=torch.float64)
        for stack in self.stacks:  # one after the other: their fp64 copies need not stand in memory together
            rows = stack.flatten(1).double()
            gram += rows @ rows.t()
        weights = self.combination.ask(self.number, self.counts > 0, means, gram)
        if self.accelerator.is_main_process:  # the gradients of all processes are added next
            _accumulate(self.shared, [torch.tensordot(weights.to(one), one, dims=1) for one in self.stacks])
        return weights.to(means) / self.counts.clamp(min=1)


def _accumulate(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            p.grad = grad.clone() if p.grad is None else p.grad.add_(grad)
