"""GLS: MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning (Chennupati,
Sistu, Yogamani, Rawashdeh, CVPR Workshops 2019). https://arxiv.org/abs/1904.08325

    loss = (prod_t L_t)^(1/T),   w_t = dloss / dL_t = loss / (T L_t)

The weights are the paper's: not normalised, w_t L_t is the same for every task and their sum is the loss itself. A
single task has 1. Deviation: a loss counts as at least 1e-8, because the mean of losses of 0 has no derivative.
"""

from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import losses_of

SMALLEST = 1e-8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GLS(PerTask):
    needs = "losses"

    def solve(self, step: Step, memory: State) -> Tensor:
        logs = losses_of(step).clamp_min(SMALLEST).log()
        return (logs.mean() - logs).exp() / len(logs)
