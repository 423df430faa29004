"""Uniform: every live task counts alike. w_t = 1 / T; the weights sum to 1.

What papers call linear scalarisation or equal weighting; some of them add where this takes the mean.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Uniform(PerTask):
    needs = "nothing"

    def solve(self, step: Step, memory: State) -> Tensor:
        return torch.full((len(step.tasks),), 1 / len(step.tasks), dtype=torch.float64)
