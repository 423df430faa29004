"""UPGrad: Jacobian Descent for Multi-Objective Optimization (Quinton and Rey, 2024). https://arxiv.org/abs/2406.16232

    d = mean_t of the projection of g_t on {d: g_u . d >= 0 for every u}

The projection of g_t is sum_u v_u g_u with v = argmin v'Mv over v >= e_t. No task is worsened to first order. The
weights are the paper's: each is at least 1 / T (1 / T where nothing conflicts), and a single task has 1.

Deviation from the released code (torchjd): it adds 1e-4 of the trace to M's diagonal for its solver, which lets d
conflict a little; here M is as given and the minimum exact.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import gram_of, nonnegative


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UPGrad(PerTask):
    needs = "gradients"

    def solve(self, step: Step, memory: State) -> Tensor:
        gram = gram_of(step)
        projected = torch.eye(len(gram), dtype=gram.dtype) + torch.stack([nonnegative(gram, -row) for row in gram])
        return projected.mean(0)
