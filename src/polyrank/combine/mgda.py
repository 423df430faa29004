"""MGDA: Multi-Task Learning as Multi-Objective Optimization (Sener and Koltun, NeurIPS 2018), after Désidéri
(Comptes Rendus Mathématique 2012). https://arxiv.org/abs/1810.04650

    w = argmin |sum_t w_t g_t|  over  w >= 0, sum w = 1

The smallest vector of the gradients' hull: a step along it worsens no task, and it is 0 where none can gain without
another's loss. So a single task has weight 1, and a live task whose gradient is 0 takes all the weight: nothing moves.

Deviations: the released code (isl-org/MultiObjectiveOptimization) has Frank-Wolfe stop at 250 rounds or 1e-5; here an
active set finds the minimum itself. Its optional normalisations of the gradients are left out.
"""

from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import gram_of, min_norm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MGDA(PerTask):
    needs = "gradients"

    def solve(self, step: Step, memory: State) -> Tensor:
        return min_norm(gram_of(step))
