"""A trained orthogonal matrix: the product of Householder reflections in compact WY form.

    P = H_1 H_2 ... H_L,  H_i = I - 2 u_i u_i',  |u_i| = 1
      = I - U' T U,       U = [u_1 .. u_L] as rows (L, I),   T = (I/2 + striu(U U'))^-1   (upper triangular)

Source of the parametrisation: HRA (Yuan et al., 2024), https://arxiv.org/abs/2405.17484. Neighbouring vectors start
equal, so each pair cancels and P starts as the identity.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        v = self.vectors
        exact = v.dtype if v.device.type == "mps" else torch.float64  # so that what cancels does: L x I is small
        u = F.normalize(v.to(exact), dim=-1)
        eye = torch.eye(len(u), device=u.device, dtype=exact)
        t = torch.linalg.solve_triangular(torch.triu(u @ u.t(), 1) + 0.5 * eye, eye, upper=True)  # (L, L)
        second = torch.kron(eye[::2, ::2], eye[:2, :2].roll(1, 1).triu())  # (u_1, u_2) -> (u_2, 0); not from the host
        pair, back = eye - second, eye + second
        return (pair @ u).to(v.dtype), (back.t() @ t @ back).to(v.dtype)  # u = back (pair u)

    def matrix(self) -> Tensor:
        """P (I, I), dense."""
        rows, core = self.factors()
        return torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype) - rows.t() @ core @ rows
