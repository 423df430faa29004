"""PCGrad: Gradient Surgery for Multi-Task Learning (Yu, Kumar, Gupta, Levine, Hausman, Finn, NeurIPS 2020).
https://arxiv.org/abs/2001.06782

    v_t = g_t;   for u in a random order of the other tasks:  if v_t . g_u < 0:  v_t -= (v_t . g_u / |g_u|^2) g_u
    d = sum_t v_t

v_t is sum_u c_u g_u, and v_t . g_u = (M c)_u: the coefficients follow from the Gram matrix alone. The weights are the
paper's sum, not a mean: each is at least 1 (1 where nothing conflicts, and for a single task), so a step is about T
times that of ``Uniform``. No deviation but the source of the order, which depends on the seed and the step alone.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import gram_of


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PCGrad(PerTask):
    needs = "gradients"

    def solve(self, step: Step, memory: State) -> Tensor:
        gram, generator = gram_of(step), step.generator()
        weights = torch.zeros_like(gram[0])
        for task in range(len(gram)):
            v = torch.zeros_like(weights)
            v[task] = 1.0
            for other in torch.randperm(len(gram), generator=generator).tolist():
                product = gram[other] @ v
                if other != task and product < 0 and gram[other, other] > 0:
                    v[other] -= product / gram[other, other]
            weights += v
        return weights
