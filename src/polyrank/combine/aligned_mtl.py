"""Aligned-MTL: Independent Component Alignment for Multi-Task Learning (Senushkin, Patakin, Kuznetsov, Konushin,
CVPR 2023). https://arxiv.org/abs/2305.19000

    M = V diag(l) V',   w = sqrt(l_min) V diag(l)^(-1/2) V' p,   p = 1 / T

The gradients are replaced by the nearest matrix with all singular values equal, to the smallest, and then averaged. The
weights are the paper's and do not sum to 1; a single task has 1. Eigenvalues within rounding of 0 are left out, as in
the paper, so l_min is the smallest of the others and copies of a task share one direction. A gradient of 0 has weight
0, and so has everything if all are.
"""

from pydantic.dataclasses import dataclass
from torch import Tensor, linalg

from .base import STRICT, PerTask, State, Step
from .solvers import EPS, gram_of


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlignedMTL(PerTask):
    needs = "gradients"

    def solve(self, step: Step, memory: State) -> Tensor:
        values, vectors = linalg.eigh(gram_of(step))
        kept = values > len(values) * EPS * values[-1]  # ascending
        values, vectors = values[kept], vectors[:, kept]
        return vectors @ ((values[:1] / values).sqrt() * vectors.mean(0))
