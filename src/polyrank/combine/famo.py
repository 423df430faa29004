"""FAMO: Fast Adaptive Multitask Optimization (Liu, Feng, Stone, Liu, NeurIPS 2023). https://arxiv.org/abs/2306.03792

    z = softmax(xi),   w_t = (z_t / L_t) / sum_u (z_u / L_u)
    after the step, on the same examples:  delta_t = log L_t - log L'_t,   xi by Adam along  z_t (delta_t - z . delta)

so tasks that fell behind in relative improvement gain weight. The weights sum to 1; a single task has 1.

Adam's rate 0.025 is the released code's (Cranial-XIX/FAMO); its decay of xi there is 0.01 by default, here 0.001.
Deviations: a loss counts as at least 1e-8, where the code adds 1e-8; the losses' lowest values are taken as 0, which is
the code's default.
"""

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import adam, adam_memory, losses_of

SMALLEST = 1e-8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FAMO(PerTask):
    lr: PositiveFloat = 0.025
    """Adam's rate for xi"""
    weight_decay: NonNegativeFloat = 1e-3
    """of xi, towards even weights"""

    needs, looks_again = "losses", True
    memory = adam_memory("xi", 0.0)

    def solve(self, step: Step, memory: State) -> Tensor:
        return (memory["xi"] - losses_of(step).clamp_min(SMALLEST).log()).softmax(0)

    def learn(self, step: Step, losses: Tensor, memory: State) -> None:
        z = memory["xi"].softmax(0)
        gained = losses_of(step).clamp_min(SMALLEST).log() - losses.clamp_min(SMALLEST).log()
        adam(memory, "xi", z * (gained - z @ gained), self.lr, self.weight_decay)
