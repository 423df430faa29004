"""Uncertainty weighting: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics
(Kendall, Gal, Cipolla, CVPR 2018). https://arxiv.org/abs/1705.07115

    loss = sum_t L_t / (2 e^(s_t)) + s_t / 2,   w_t = 1 / (2 e^(s_t)),   s_t = log of the task's variance, learnt from 0

The weights are the paper's and are not normalised: 1/2 each at the start, in the long run 1 / (2 L_t).

Deviations: the paper gives classification L_t / e^(s_t), twice this. A combiner does not know a task's kind, so all
have the form above; the factor moves the optimum of s_t by log 2 and leaves w_t L_t = 1/2 there. The derivative
(1 - L_t / e^(s_t)) / 2 is taken in closed form, after a step that counted; s has Adam of its own, where the paper has
the network's optimiser, at Adam's usual rate.
"""

from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import adam, adam_memory


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Uncertainty(PerTask):
    lr: PositiveFloat = 1e-3
    """Adam's rate for the log-variances"""

    needs = "nothing"
    memory = adam_memory("s", 0.0)

    def solve(self, step: Step, memory: State) -> Tensor:
        return (-memory["s"]).exp() / 2

    def learn(self, step: Step, losses: Tensor, memory: State) -> None:
        adam(memory, "s", (1 - losses * (-memory["s"]).exp()) / 2, self.lr)
