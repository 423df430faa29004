"""TeamLoRA: Boosting Low-Rank Adaptation with Expert Collaboration and Competition (Lin et al., ACL Findings 2025).

https://arxiv.org/abs/2408.09856

    y = W x + b + (alpha / r) sum_{i <= N} w_i B_i z_i,    (z_1 .. z_N) = A x
    w = M phi,    phi = softmax(MLP(x)),    M (N, N)

One wide A is everybody's knowledge; each B_i is a plug-in that reads its own slice of it. phi is what each plug-in
contributes (the paper's Shapley values), M how they play together.

Choose it if a token mixture should weigh its experts jointly, not each by itself.

Reconstruction: the method's code was not released; the forward is a reading of the paper in a third-party note.
- The MLP is a bottleneck with SiLU, its second map zero at the start, so that phi begins even.
- M starts with a unit diagonal and the rest uniform within +-1 / N.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    Gate,
    LoRAExperts,
    Mixture,
    MixtureLinear,
    Softmax,
    TokenRouter,
    uniform,
)
from .base import STRICT, Method


class Interaction(Gate):
    """M softmax(logits)."""

    def __init__(self, base: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.softmax = Softmax()
        self.interaction = uniform(base, num_experts, num_experts, bound=1 / num_experts)
        with torch.no_grad():
            self.interaction.fill_diagonal_(1)

    def forward(self, logits: Tensor) -> Tensor:
        phi = self.softmax(logits)
        return F.linear(phi, self.interaction.to(phi.dtype))

    def num_active(self, num_experts: int) -> int:
        return num_experts


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeamLoRA(Method):
    SIZE: ClassVar[str] = "num_experts * rank * (I + O) + router_dim * (I + num_experts) + num_experts**2"

    num_experts: PositiveInt = 4
    """N"""
    rank: PositiveInt = 8
    """r, of each expert"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    router_dim: PositiveInt = 16
    """the hidden units of the MLP"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base,
                experts=LoRAExperts(base, self.num_experts, self.rank),
                router=TokenRouter(base, self.router_dim, self.num_experts, nn.SiLU()),
                gate=Interaction(base, self.num_experts),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }
