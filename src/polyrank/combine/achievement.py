"""Achievement-based weights: Achievement-based Training Progress Balancing for Multi-Task Learning (AMTL: Yun and Cho,
ICCV 2023), used by C-LoRAE (IJCAI 2025, https://arxiv.org/abs/2505.06303).

    v_t = (1 - acc_t / (P_t (1 + margin)))^gamma,   w_t = v_t / sum_u v_u
    acc_t <- momentum * score_t + (1 - momentum) * acc_t,  the first score as it is

P_t is the score that the task reaches alone; scores are better when higher, of the scale of P_t. The weights sum to 1.
The formula and its constants are those of AMTL's released code (Samsung/Achievement-based-MTL). It normalises by the
sum or, its default, by a softmax; here by the sum, since a softmax of numbers in [0, 1] all but evens them out. It
combines the losses arithmetically, as here, or in a weighted geometric mean.

Reconstruction: C-LoRAE's code is not public, its own gamma, margin and normalisation are not known: AMTL's stand in.

Deviations: a score beyond P_t (1 + margin) counts as equal to it, where an even gamma lets the weight grow again; a
task not scored yet counts as 0 achieved; if all have achieved everything they count alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, Combiner, State, Step


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Achievement(Combiner):
    potential: dict[str, Annotated[float, Field(gt=0, le=1)]]
    """P_t: the score that each task reaches alone, by its metric, as a share of 1: such as {r8: 0.94, movies: 0.81}"""
    gamma: PositiveFloat = 2.0
    """how steeply the weight falls as the score nears P_t"""
    margin: NonNegativeFloat = 0.05
    """how far beyond P_t a task may aim"""
    momentum: PositiveFloat = 0.1
    """the share of the newest score in the running one"""

    needs = "nothing"

    def check(self, tasks: Sequence[str]) -> None:
        """
        Raises:
            ValueError: the potential names other tasks.
        """
        if set(self.potential) != set(tasks):
            raise ValueError(
                f"potential names {sorted(self.potential)}, the tasks are {sorted(tasks)}: train each task alone, and "
                "give the score that it reaches"
            )

    def weights(self, step: Step, state: State) -> Tensor:
        nothing = torch.zeros((), dtype=torch.float64)
        achieved = torch.stack([state.get(task, nothing) for task in step.tasks])
        potential = torch.tensor([self.potential[task] for task in step.tasks], dtype=torch.float64)
        missing = (1 - achieved / (potential * (1 + self.margin))).clamp_min(0) ** self.gamma
        if not missing[step.live].any():
            missing = torch.ones_like(missing)
        missing = missing.where(step.live, 0.0)
        return missing / missing.sum().clamp_min(torch.finfo(torch.float64).tiny)

    def scored(self, scores: Mapping[str, float], state: State) -> None:
        for task, score in scores.items():
            if task in self.potential and math.isfinite(score):
                new = torch.tensor(score, dtype=torch.float64)
                state[task] = self.momentum * new + (1 - self.momentum) * state.get(task, new)
