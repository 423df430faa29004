"""OMoE: Diversifying Mixture of Experts Representation with Orthogonal Mixture of Experts (Feng et al., 2025).

https://arxiv.org/abs/2501.10062

    y = W x + b + (alpha / r) sum_{i in top-k} g_i o_i,    g = softmax over the k best of G x
    h_i = B_i A_i x,    o_i = h_i - sum_{j < i} <h_i, o_j> / <o_j, o_j> o_j       (Gram-Schmidt, token by token)

The experts' outputs are made orthogonal before they are mixed, so that no expert repeats another.

Choose it if the experts of a token mixture become alike.

Reconstruction: no code was released and only the abstract was read.
- The outputs keep their lengths (``length="kept"``), because a vector of length 1 cannot start at zero. ``"unit"`` is
  the abstract's Stiefel manifold: o_i / |o_i|, with B as A at the start, which does not begin as the base.
- Gram-Schmidt runs on the rank side, on the Gram matrix of the outputs: no tokens x experts x O tensor.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import (
    JointTopK,
    LinearRouter,
    Mixture,
    MixtureLinear,
    Pairs,
    Site,
    uniform,
)
from .base import STRICT, Method

SHARE = 1e-10  # of an output's squared length: what is left of it beside the earlier ones has no direction below that


class OrthogonalExperts(Pairs):
    """Pairs whose outputs go through Gram-Schmidt, in their order."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int, length: str) -> None:
        super().__init__(base, num_experts, rank)
        self.length = length
        if length == "unit":
            self.lora_B = uniform(base, *self.lora_B.shape)

    def active_parameters(self, num_active: int) -> int:
        return super().active_parameters(self.num_experts)  # the chosen outputs depend on all

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        with torch.autocast(z.device.type, enabled=False):
            weights = self._weights(z, gate)
        return (z.unflatten(-1, (self.num_experts, self.rank)) * weights.to(z.dtype).unsqueeze(-1)).flatten(-2)

    def _weights(self, z: Tensor, gate: Tensor) -> Tensor:
        """How much of each h is in sum_i g_i o_i, (..., E)."""
        shape = self.num_experts, self.rank
        exact = z.dtype if z.device.type == "mps" else torch.float64  # alike experts all but cancel
        ranks, b = z.to(exact).unflatten(-1, shape), self.lora_B.to(exact)  # (..., E, r)
        products = (b @ b.t()).unflatten(0, shape).unflatten(-1, shape)  # (E, r, E, r)
        gram = torch.einsum("...er,erfs,...fs->...ef", ranks, products, ranks)  # <h_e, h_f>
        eye = torch.eye(self.num_experts, device=z.device, dtype=gram.dtype)
        done: list[tuple[Tensor, Tensor]] = []  # o_j in the h's, 1 / <o_j, o_j>
        total = torch.zeros_like(gram[..., 0])  # sum_i g_i o_i in the h's, (..., E)
        for i in range(self.num_experts):
            o = eye[i].expand_as(total)
            for earlier, inverse in done:
                along = (gram[..., i, :] * earlier).sum(-1, keepdim=True) * inverse  # <h_i, o_j> / <o_j, o_j>
                o = o - along * earlier
            squared = torch.einsum("...e,...ef,...f->...", o, gram, o).unsqueeze(-1)
            there = squared > SHARE * gram[..., i, i].unsqueeze(-1)
            inverse = torch.where(there, 1 / torch.where(there, squared, 1), 0)
            done.append((o, inverse))
            total = total + gate[..., i : i + 1] * (o if self.length == "kept" else o * inverse.sqrt())
        return total


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OMoE(Method):
    SIZE: ClassVar[str] = "num_experts * (rank * (I + O) + I)"

    num_experts: PositiveInt = 4
    """N"""
    k: PositiveInt = 2
    """how many experts are active"""
    rank: PositiveInt = 8
    """r, of each expert"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    length: Literal["kept", "unit"] = "kept"
    """of the orthogonal outputs"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.num_experts:
            raise ValueError(f"k={self.k} of {self.num_experts} experts: lower k, or add experts")
        return self

    @property
    def starts_as_base(self) -> bool:
        return self.length == "kept"

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base,
                experts=OrthogonalExperts(base, self.num_experts, self.rank, self.length),
                router=LinearRouter(base, self.num_experts),
                gate=JointTopK(self.k),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }
