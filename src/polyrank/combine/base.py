"""A combiner decides how much each task counts in a step. It is a frozen configuration; its memory, a dict of tensors.

The loop asks for weights and makes of them one update of the shared weights: sum_t w_t g_t, with g_t the gradient of
task t's mean loss over the whole accumulated step of all processes. What a combiner remembers between steps stands in
``State`` and so in every checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import ClassVar, Literal, final

import torch
from pydantic import ConfigDict
from torch import Tensor

# an unknown setting is an error, not a default; a string below a setting says what it is
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
State = dict[str, Tensor]  # starts empty; fp64, one entry per thing remembered, each saved with the checkpoint


@dataclass(frozen=True)
class Step:
    """What a combiner sees of a step. T tasks; all tensors are fp64 on the CPU."""

    tasks: tuple[str, ...]
    live: Tensor  # (T,) bool: tasks with a valid label in this step; the others have loss 0 and gradient 0
    number: int = 0  # counted from 0
    seed: int = 0
    losses: Tensor | None = None  # (T,) mean loss of each task; given if the combiner needs losses or gradients
    gram: Tensor | None = None  # (T, T) inner products of the shared gradients; given if it needs gradients

    def __post_init__(self) -> None:
        shapes = {"live": (len(self.tasks),), "losses": (len(self.tasks),), "gram": (len(self.tasks),) * 2}
        for name, shape in shapes.items():
            given = {"live": self.live, "losses": self.losses, "gram": self.gram}[name]
            dtype = torch.bool if name == "live" else torch.float64
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.dtype != dtype or tuple(given.shape) != shape:
                found = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(
                    f"Step.{name} must be a {dtype} tensor {shape} for {len(self.tasks)} tasks, got {found}"
                )

    def generator(self) -> torch.Generator:
        """Noise of this step: a function of (seed, step) alone, the same in every process and after resuming."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.number) % 2**63)


class Combiner(ABC):
    """What every combiner provides."""

    needs: ClassVar[Literal["nothing", "losses", "gradients"]]  # of this step, beside its State
    looks_again: ClassVar[bool] = False  # whether ``after`` needs the losses of the same examples after the step

    def check(self, tasks: Sequence[str]) -> None:
        """
        Raises:
            ValueError: the settings do not fit these tasks.
        """
        return

    @abstractmethod
    def weights(self, step: Step, state: State) -> Tensor:
        """w (T,), fp64, 0 for tasks that are not live. May change ``state``."""

    def after(self, step: Step, losses: Tensor, state: State) -> None:
        """Called for a step that is taken, with its losses (T,): after the update if ``looks_again``, else before."""
        return

    def scored(self, scores: Mapping[str, float], state: State) -> None:
        """Called with each task's held-out score whenever the loop has looked."""
        return


class PerTask(Combiner):
    """A combiner that weighs the live tasks alone and remembers numbers of each task: all but ``Achievement``.

    What a subclass sees has no other task in it, so no formula needs a mask. A step or a result that is not finite
    changes nothing in ``state``, and the live tasks then count alike: 1 / their number each.
    """

    memory: ClassVar[Mapping[str, float]] = {}  # what is remembered of each task, and the value that it starts from

    @abstractmethod
    def solve(self, step: Step, memory: State) -> Tensor:
        """w (T,) of a step whose T tasks are all live. Replaces entries (T,) of ``memory``; never writes into them."""

    def learn(self, step: Step, losses: Tensor, memory: State) -> None:
        """As ``after``, of the live tasks alone."""
        return

    @final
    def weights(self, step: Step, state: State) -> Tensor:
        weights = torch.zeros(len(step.tasks), dtype=torch.float64)
        if not step.live.any():
            return weights
        weights[step.live] = 1.0 / step.live.sum()
        if (seen := self._seen(step)) is not None:
            memory = self._remembered(step.live, state)
            found = self.solve(seen, memory)
            if _finite(found, *memory.values()):
                weights[step.live] = found
                self._keep(step.live, memory, state)
        return weights

    @final
    def after(self, step: Step, losses: Tensor, state: State) -> None:
        if (seen := self._seen(step)) is None or not _finite(losses[step.live]) or not step.live.any():
            return
        memory = self._remembered(step.live, state)
        self.learn(seen, losses[step.live], memory)
        if _finite(*memory.values()):
            self._keep(step.live, memory, state)

    def _seen(self, step: Step) -> Step | None:
        """The step without the tasks that are not live; None if it is not finite."""
        live, losses, gram = step.live, step.losses, step.gram
        if (losses is None and self.needs != "nothing") or (gram is None and self.needs == "gradients"):
            lacking = "losses" if losses is None else "gram"
            raise ValueError(f"{type(self).__name__} needs {self.needs}, and Step lacks `{lacking}`")
        losses = None if losses is None else losses[live]
        gram = None if gram is None else gram[live][:, live]
        if not _finite(*(measured for measured in (losses, gram) if measured is not None)):
            return None
        return replace(step, tasks=tuple(compress(step.tasks, live)), live=live[live], losses=losses, gram=gram)

    def _remembered(self, live: Tensor, state: State) -> State:
        start = torch.ones(len(live), dtype=torch.float64)
        return {name: state.get(name, value * start)[live] for name, value in self.memory.items()}

    def _keep(self, live: Tensor, memory: State, state: State) -> None:
        start = torch.ones(len(live), dtype=torch.float64)
        for name, value in self.memory.items():
            state[name] = state.get(name, value * start).masked_scatter(live, memory[name])


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
