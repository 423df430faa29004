"""Conditional MixLoRA: Multimodal Instruction Tuning with Conditional Mixture of LoRA (Shen et al., ACL 2024).

https://arxiv.org/abs/2402.15896

    y = W x + b + (alpha / r) sum_{i <= r} b_{beta_i} (a_{alpha_i}'x),    a (E, I) and b (E, O) are pools of factors
    alpha = the r best of G_a h,    h = the mean of the sample's prompt
    beta  = the r best of p_b = softmax(G_b h) + weight * softmax(sum_i softmax(G_ab[i] a_{alpha_i}))

Each sample composes a LoRA of its own from two pools. What is taken from the second depends on what was taken from the
first, and the i-th of one is paired with the i-th of the other.

Choose it if samples, not tasks, differ, as instructions do.

Deviations from the released code:
- The routers are trained, by a straight-through factor of value 1 on each pair, whose gradient is that of
  softmax(G_a h)[alpha_i] p_b[beta_i]. Theirs choose by index alone, no gradient ever reaches them, and the choice is a
  fixed random hash: ``selection="released"`` is that, routers frozen.
- G_ab[i] a is a product of vectors (their einsum sums the two over their features apart).
- The mean is over the prompt's tokens (theirs includes padding).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import (
    Experts,
    Mixture,
    MixtureLinear,
    Router,
    Site,
    exact_linear,
    for_samples,
    in_out_features,
    uniform,
    zeros,
)
from .base import STRICT, Method


class PooledLogits(Router):
    """G_a h and G_b h, side by side."""

    reads = frozenset({"sample"})

    def __init__(self, base: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.weight = uniform(base, 2 * num_experts, in_out_features(base)[0])

    def rows(self) -> None:
        return None

    def forward(self, x: Tensor, z: Tensor, site: Site) -> Tensor:
        pooled = site.pool_prompt(x)
        return for_samples(exact_linear(pooled, self.weight), x)

    def active_parameters(self) -> int:
        return self.weight.numel() if self.weight.requires_grad else 0

    def flops_per_token(self) -> int:
        return 0


class Pools(Experts):
    """Two pools of vectors, of which r pairs are chosen."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int, weight: float, trained: bool) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank, self.weight, self.trained = num_experts, rank, weight, trained
        self.lora_A = uniform(base, num_experts, in_features)
        self.lora_B = zeros(base, num_experts, out_features)
        self.follow = uniform(base, rank, num_experts, in_features)  # G_ab

    def down(self) -> Tensor:
        return self.lora_A

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B

    def active_parameters(self, num_active: int) -> int:
        chosen = self.rank * (self.lora_A.shape[1] + self.lora_B.shape[1])
        return chosen + (self.follow.numel() if self.trained else 0)

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        first, second = gate.to(self.lora_A.dtype).split(self.num_experts, -1)  # (..., E) each
        p_a = first.softmax(-1)
        alpha = first.topk(self.rank, -1).indices  # (..., r)
        follows = torch.einsum("ai,rbi->rab", self.lora_A, self.follow).softmax(-1)  # (r, E of A, E of B)
        own = follows[torch.arange(self.rank, device=alpha.device), alpha]  # (..., r, E of B)
        p_b = second.softmax(-1) + self.weight * own.sum(-2).softmax(-1)
        beta = p_b.topk(self.rank, -1).indices
        leading = (*z.shape[:-1], self.rank)
        taken = z.gather(-1, alpha.expand(leading))
        if self.trained:
            p = p_a.gather(-1, alpha) * p_b.gather(-1, beta)
            taken = taken * (p - p.detach() + 1).to(z.dtype)  # value 1, gradient of p
        return torch.zeros_like(z).scatter(-1, beta.expand(leading), taken)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConditionalMixLoRA(Method):
    SIZE: ClassVar[str] = "num_experts * (I + O) + (selection == 'straight_through') * num_experts * (2 + rank) * I"

    num_experts: PositiveInt = 16
    """E, the size of each pool"""
    rank: PositiveInt = 4
    """r, how many are taken of each"""
    alpha: PositiveFloat = 32.0
    """the scale is alpha / r"""
    weight: NonNegativeFloat = 1.0
    """how much the first choice counts in the second; 0 makes them independent"""
    selection: Literal["straight_through", "released"] = "straight_through"
    """trained routers, or the released random ones"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rank > self.num_experts:
            raise ValueError(f"rank={self.rank} of {self.num_experts} experts: lower the rank, or add experts")
        return self

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            router = PooledLogits(base, self.num_experts)
            trained = self.selection == "straight_through"
            experts = Pools(base, self.num_experts, self.rank, self.weight, trained)
            if not trained:
                router.requires_grad_(False)
                experts.follow.requires_grad_(False)
            layers[name] = MixtureLinear(base, experts=experts, router=router, scale=self.alpha / self.rank)
        return layers
