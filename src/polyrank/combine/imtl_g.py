"""IMTL-G: Towards Impartial Multi-task Learning (Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, ICLR 2021).
https://openreview.net/forum?id=IMPnRXEWpvr

    d = sum_t w_t g_t,   sum w = 1,   d . g_t / |g_t| the same for every t

so w is M^-1 n scaled to sum 1, n_t = |g_t|. With cosines C: w_t ~ (C^-1 1)_t / |g_t|. Weights may be negative, as in
the paper; a single task has 1.

Deviations, where the paper's inverse does not exist: C's pseudo-inverse, so that the answer depends on no task's scale
(copies of a task share its weight). torchjd has M's; the directions are equal where an impartial one exists. Where
opposed gradients leave none, w_t ~ 1 / |g_t|, which is 0 in sum for two of them. A gradient of 0 has weight 0.
"""

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from .base import STRICT, PerTask, State, Step
from .solvers import cosines, gram_of, norms_of


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IMTLG(PerTask):
    needs = "gradients"

    def solve(self, step: Step, memory: State) -> Tensor:
        gram = gram_of(step)
        norms = norms_of(gram)
        moves = norms > 0
        shares = torch.linalg.pinv(cosines(gram[moves][:, moves], norms[moves]), hermitian=True).sum(1)
        shares = shares / norms[moves]
        if shares.sum().abs() <= 1e-9 * shares.abs().sum():  # no scale makes these sum to 1
            shares = 1 / norms[moves]
        return torch.zeros_like(norms).masked_scatter(moves, shares / shares.sum())
