"""MoDE: Effective Multi-task Parameter Efficient Fine-Tuning with a Mixture of Dyadic Experts (Ning et al., 2024).

https://arxiv.org/abs/2408.01505

    y = W x + b + sum_{j <= r} sum_{i <= m} g_j^i b_j^i (a_j'x),    g_j = softmax_i(G_j x)

One A for all; each of its r ranks has m alternatives b_j^i and chooses among them by itself. In the paper's m x r x p,
p ranks choose together: p = r is a shared-A mixture such as HydraLoRA, m = 1 is LoRA.

Choose it if a token mixture should be as fine-grained as its ranks.

There is no released code. A starts as N(0, 0.01), read as the variance, B as zero, as in the paper; the routers as
nn.Linear's default, because it is silent there.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from pydantic import PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import nn

from ..mixture import LinearRouter, Mixture, MixtureLinear, SharedDownExperts, Softmax
from .base import STRICT, Method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoDE(Method):
    SIZE: ClassVar[str] = "rank * I + num_experts * rank * O + num_experts * (rank // block) * I"

    num_experts: PositiveInt = 6
    """m, the alternatives of each rank"""
    rank: PositiveInt = 4
    """r"""
    block: PositiveInt = 1
    """p, how many neighbouring ranks choose together; a divisor of r"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rank % self.block:
            raise ValueError(f"rank={self.rank} is not divisible by block={self.block}: take a divisor of the rank")
        return self

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            experts = SharedDownExperts(base, self.num_experts, self.rank, self.block)
            nn.init.normal_(experts.lora_A, std=0.1)
            layers[name] = MixtureLinear(
                base,
                experts=experts,
                router=LinearRouter(base, self.num_experts * self.rank // self.block),
                gate=Softmax(group=self.num_experts),
            )
        return layers
