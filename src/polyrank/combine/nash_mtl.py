"""Nash-MTL: Multi-Task Learning as a Bargaining Game (Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya,
ICML 2022). https://arxiv.org/abs/2202.01017

    d = sum_t a_t g_t,   a_t (M a)_t = 1 for every t,   a > 0,   M = G G':   proportional fairness in a ball

a is the minimum of 1/2 a'Ma - sum_t log a_t, which is self-concordant: damped Newton finds it. The weights are the
paper's: not normalised, |d|^2 = T whatever the gradients' scale, and 1 / |g| for a single task.

Deviations from the released code (AvivNavon/nash-mtl): it approaches the same equation by at most 20 convex-concave
rounds of a general solver down to 1e-3, on M / |M|_F without undoing the scale, and clips the norm afterwards; here the
equation itself is solved, to ``tolerance`` = the largest |a_t (M a)_t - 1|, its rounding included. M is scaled by
|g_t| |g_u|, then a by 1 / |g_t|: the answer does not depend on any task's scale. As there, previous weights are kept
where no solution is found (gradients that oppose exactly have none) and between updates; they are kept for each task,
and a task that has none gets 1 / |g_t|, the solution for orthogonal gradients. A gradient of 0 has no part in the
bargain and weight 0.
"""

from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import EPS, cosines, gram_of, norms_of


def bargain(m: Tensor) -> Tensor:
    """a with a_t (M a)_t = 1, for M (T, T) with a unit diagonal; whatever was reached if there is none.

    In the relative step y = da / a the Hessian is A M A + 1 with A = diag(a): never near singular.
    """
    a = torch.ones_like(m[0])
    for _ in range(200):
        residual = a * (m @ a) - 1
        hessian = m * a * a[:, None]
        hessian.diagonal().add_(1.0)
        y, info = torch.linalg.solve_ex(hessian, -residual)
        decrement = (-residual @ y).clamp_min(0).sqrt()
        if info or not decrement >= 1e-12:  # rounding's size, or not a number
            break
        a = a * (1 + y / (1 + decrement) if decrement > 0.25 else 1 + y)  # positive: every |y_t| < decrement < 1
    return a


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NashMTL(PerTask):
    update_every: PositiveInt = 1
    """steps between two bargains; the weights stay in between"""
    tolerance: PositiveFloat = 1e-6
    """the largest |a_t (M a)_t - 1| that counts as solved; otherwise the weights stay"""

    needs = "gradients"
    memory: ClassVar = {"weights": 0.0}  # 0: none yet

    def solve(self, step: Step, memory: State) -> Tensor:
        gram, known = gram_of(step), memory["weights"]
        norms = norms_of(gram)
        moves = norms > 0
        if step.number % self.update_every == 0 or (known[moves] == 0).any():
            m = cosines(gram[moves][:, moves], norms[moves])
            a = bargain(m) if moves.any() else norms[moves]
            rounding = 10 * EPS * a * (m.abs() @ a)  # the sum may cancel so far that its value says nothing
            if ((a * (m @ a) - 1).abs() + rounding <= self.tolerance).all():
                memory["weights"] = known = known.masked_scatter(moves, a / norms[moves])
        return torch.where(known > 0, known, 1 / norms).where(moves, 0.0)
