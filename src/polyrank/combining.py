"""A combiner at work: what it is asked in a step, and what its weights make of the gradients."""

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
            alive = [i for i in range(len(self.tasks)) if step.live[i]]
            found["cosines"] = {
                self.tasks[i]: {self.tasks[j]: cosines[i][j] for j in alive if j > i} for i in alive[:-1]
            }
        return found


class Apart:
    """The gradients of each task on the shared weights, kept apart over a step's micro-batches."""

    def __init__(self, shared: Sequence[nn.Parameter], others: Sequence[nn.Parameter], num_tasks: int) -> None:
        """others: weights that are one task's own: they get the gradient of the mean of the live tasks' losses."""
        self.shared, self.others = list(shared), list(others)
        self.stacks = [p.new_zeros(num_tasks, *p.shape) for p in shared]  # (T, ...)

    def add(self, task: int, loss: Tensor, share: float) -> None:
        grads = torch.autograd.grad(loss, [*self.shared, *self.others], retain_graph=True, allow_unused=True)
        for stack, grad in zip(self.stacks, grads, strict=False):
            if grad is not None:
                stack[task] += grad
        _accumulate(self.others, [None if g is None else g * share for g in grads[len(self.shared) :]])

    def add_auxiliary(self, loss: Tensor) -> None:
        """A loss of the method, of no task: its gradient is added as it is."""
        if loss.requires_grad:
            every = [*self.shared, *self.others]
            _accumulate(every, torch.autograd.grad(loss, every, allow_unused=True))

    def sum(self, accelerator: Accelerator) -> None:
        """Over the processes: a combination of means is not the mean of combinations."""
        if accelerator.num_processes > 1:
            flat = torch.cat([stack.reshape(-1) for stack in self.stacks])
            torch.distributed.all_reduce(flat)
            sizes = [stack.numel() for stack in self.stacks]
            self.stacks = [part.view_as(stack) for part, stack in zip(flat.split(sizes), self.stacks, strict=True)]

    def gram(self) -> Tensor:
        """(T, T), summed in fp64."""
        flat = [stack.flatten(1).double() for stack in self.stacks]
        return torch.stack([one @ one.t() for one in flat]).sum(0)

    def apply(self, weights: Tensor) -> None:
        """Add sum_t w_t g_t to the shared weights' gradients."""
        _accumulate(self.shared, [torch.tensordot(weights.to(stack), stack, dims=1) for stack in self.stacks])


def _accumulate(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            p.grad = grad.clone() if p.grad is None else p.grad.add_(grad)
