"""A trained orthogonal matrix: the product of Householder reflections in compact WY form.

    P = H_1 H_2 ... H_L,  H_i = I - 2 u_i u_i',  |u_i| = 1
      = I - U' T U,       U = [u_1 .. u_L] as rows (L, I),   T = (I/2 + striu(U U'))^-1   (upper triangular)

Source of the parametrisation: HRA (Yuan et al., 2024), https://arxiv.org/abs/2405.17484. Neighbouring vectors start
equal, so each pair cancels and P starts as the identity.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Reflections(nn.Module):
    """P (I, I) as two thin factors: ``x P = x - (x rows') weights`` with rows (L, I) and weights (L, I).

    The rows are given in the basis (u_1 - u_2, u_2, u_3 - u_4, u_4, ...), which spans the same space. While a pair is
    nearly equal, its first row is small instead of two large products cancelling each other: the step-0 identity holds
    exactly in every precision.
    """

    def __init__(self, in_features: int, num_reflections: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        bound = (2 / num_reflections) ** 0.5  # kaiming_uniform(a=sqrt(5)) of an (I, L/2) matrix
        half = torch.empty(num_reflections // 2, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
        self.vectors = nn.Parameter(half.repeat_interleave(2, 0))  # (L, I)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(rows, core), with P = I - rows' core rows. rows: (L, I); core: (L, L)."""
        return _Factors.apply(self.vectors)  # type: ignore[return-value]

    def matrix(self) -> Tensor:
        """P (I, I), dense."""
        rows, core = self.factors()
        return torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype) - rows.t() @ core @ rows


class _Factors(torch.autograd.Function):
    """In fp64, so that what cancels does: L x I is small. Written out, because autograd's own takes four times as long.

    u = v / |v|,  M = I/2 + striu(u u'),  T = M^-1,  rows = F u,  core = B' T B,  with F (u1, u2) = (u1 - u2, u2) and
    B = F^-1 on each pair of neighbours.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        exact = v.to(v.dtype if v.device.type == "mps" else torch.float64)
        length = exact.norm(dim=-1, keepdim=True)
        u = exact / length
        m = (u @ u.t()).triu_(1)
        m.diagonal().add_(0.5)
        t = torch.linalg.solve_triangular(m, torch.eye(len(u), device=u.device, dtype=u.dtype), upper=True)
        ctx.save_for_backward(u, length, t)
        rows, core = u.clone(), t.clone()
        rows[::2] -= u[1::2]
        core[:, 1::2] += core[:, ::2]
        core[1::2] += core[::2]
        return rows.to(v.dtype), core.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        u, length, t = ctx.saved_tensors
        drows, dcore = (grad.to(u.dtype, copy=True) for grad in grads)
        dcore[::2] += dcore[1::2]
        dcore[:, ::2] += dcore[:, 1::2]
        dm = (t.t() @ dcore @ t.t()).triu_(1).neg_()
        drows[1::2] -= drows[::2]
        du = drows.addmm_(dm + dm.t(), u)
        du = (du - (du * u).sum(-1, keepdim=True) * u).div_(length)
        return du.to(grads[0].dtype)
