"""CAGrad: Conflict-Averse Gradient Descent for Multi-task Learning (Liu, Liu, Jin, Stone, Liu, NeurIPS 2021).
https://arxiv.org/abs/2110.14048

    d = argmax_d min_t g_t . d   with  |d - g_0| <= c |g_0|,   g_0 = mean_t g_t
      = g_0 + c |g_0| g_x / |g_x|,   g_x = sum_t x_t g_t,   x = argmin  g_x . g_0 + c |g_0| |g_x|  over the simplex

Weights of Algorithm 1: 1 / T + c |g_0| x_t / |g_x|. They sum to 1 + c |g_0| / |g_x|, and a single task has 1 + c. The
released code (Cranial-XIX/CAGrad) also divides by 1 + c^2, and nash-mtl multiplies by T; here neither. c is 0.4 in
nash-mtl's comparisons, 0.5 in LibMTL's.

Solved exactly where the code calls a general optimiser: for a given r = |g_x| / (c |g_0|), x is the point nearest to 0
in the hull of {g_t + r g_0}. With s = r / (1 + r) in [0, 1], that is the hull of {(1 - s) g_t + s g_0}, and s alone is
sought: f(s) = (1 - s) |g_x| - s c |g_0| is at least 0 at 0 and less than 0 at 1, and its sign changes once, because the
objective is jointly convex in x and |g_x|. Where the best g_x is 0 the formula for d is 0 / 0; the projection of g_0 on
{d: g_t . d >= 0} then reaches the maximum, which is 0, inside the ball, and is returned.
"""

from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import EPS, gram_of, min_norm, nonnegative, root


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CAGrad(PerTask):
    c: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """how far the update may leave the mean gradient, in its length; 1 would let it be 0"""

    needs = "gradients"

    def solve(self, step: Step, memory: State) -> Tensor:
        gram = gram_of(step)
        largest, tasks = gram.diagonal().max(), len(gram)
        uniform = torch.full_like(gram[0], 1 / tasks)
        if largest <= 0:
            return uniform
        gram = gram / largest
        to_mean = gram @ uniform  # g_t . g_0
        radius = self.c * (uniform @ to_mean).clamp_min(0).sqrt()
        noise = (10 * tasks * EPS) ** 0.5  # of a norm, the root of a rounded product
        if radius <= noise:
            return uniform

        def point(s: float) -> tuple[Tensor, Tensor]:
            """x and |g_x|."""
            cross = s * (1 - s) * to_mean
            x = min_norm((1 - s) ** 2 * gram + cross + cross[:, None] + s**2 * (uniform @ to_mean))
            return x, (x @ gram @ x).clamp_min(0).sqrt()

        _, low = point(0.0)
        if low <= noise:  # then f(0) = 0, and its slope there says whether the sign changes later
            pull = nonnegative(gram, -to_mean)
            low = (pull @ gram @ pull).clamp_min(0).sqrt() - radius
            if low <= 0:
                return uniform + pull

        def f(s: float) -> float:
            return float((1 - s) * point(s)[1] - s * radius)

        x, norm = point(root(f, float(low), -float(radius)))
        return uniform + radius / norm * x
