"""GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks (Chen, Badrinarayanan, Lee,
Rabinovich, ICML 2018). https://arxiv.org/abs/1711.02257

    G_t = |w_t g_t|,   r_t = (L_t / L_t(0)) / mean_u (L_u / L_u(0)),   target_t = mean_u G_u * r_t^alpha, held constant
    w by Adam on sum_t |G_t - target_t|, then scaled to sum T

The paper differentiates G_t through the network. But |w_t g_t| = w_t sqrt(M_tt) is linear in w_t, so its derivative
sign(G_t - target_t) sqrt(M_tt) needs the Gram matrix and no second-order graph. As in the paper the weights sum to the
number of live tasks, a step uses the weights from before its update, and a single task has 1.

Deviations: the gradients are those of all shared parameters, where the paper takes the last shared layer's; L_t(0) is
the task's first loss seen; weights stay at least 1e-3 before scaling, because Adam may step past 0. ``lr`` is FAMO's
for want of a figure of the paper's that could be checked; alpha = 1.5 is the paper's for dissimilar tasks.
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import adam, adam_memory, gram_of, norms_of

SMALLEST_LOSS, SMALLEST_WEIGHT = 1e-8, 1e-3


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GradNorm(PerTask):
    alpha: NonNegativeFloat = 1.5
    """how strongly a task that trains slowly is favoured; 0 makes all gradients equally long"""
    lr: PositiveFloat = 0.025
    """Adam's rate for the weights"""

    needs = "gradients"
    memory = adam_memory("weights", 1.0) | {"first_loss": 0.0}  # 0: none yet

    def solve(self, step: Step, memory: State) -> Tensor:
        return _scaled(memory["weights"])

    def learn(self, step: Step, losses: Tensor, memory: State) -> None:
        losses, first, weights = losses.clamp_min(SMALLEST_LOSS), memory["first_loss"], _scaled(memory["weights"])
        memory["first_loss"] = first = torch.where(first == 0, losses, first)
        norms, ratio = norms_of(gram_of(step)), losses / first
        target = (weights * norms).mean() * (ratio / ratio.mean()) ** self.alpha
        memory["weights"] = weights
        adam(memory, "weights", (weights * norms - target).sign() * norms, self.lr)
        memory["weights"] = _scaled(memory["weights"].clamp_min(SMALLEST_WEIGHT))


def _scaled(weights: Tensor) -> Tensor:
    return weights * len(weights) / weights.sum()
