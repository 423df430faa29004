"""RLW: Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning (Lin, Ye, Zhang, Tsang,
TMLR 2022). https://arxiv.org/abs/2111.10603

    w = softmax(z),   z_t ~ N(0, 1) anew in every step;   the weights sum to 1

No deviation; the noise is a function of the seed and the step alone.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RLW(PerTask):
    needs = "nothing"

    def solve(self, step: Step, memory: State) -> Tensor:
        return torch.randn(len(step.tasks), dtype=torch.float64, generator=step.generator()).softmax(0)
