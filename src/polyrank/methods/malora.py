"""MALoRA: Mixture of Asymmetric Low-Rank Adaptation for Enhanced Multi-Task Learning (NAACL Findings 2025).

Wang et al. https://arxiv.org/abs/2410.22782

    y = W x + b + (alpha / r) sum_{e in top-k} g_e B_e P_e S x,    g = softmax over the k best of G x
    loss += balance * mean over layers of N sum_e f_e P_e

The experts' down-projections share one subspace S (d, I); each keeps small coordinates P_e (r, d) in it. What that
saves can be spent on B.

Choose it instead of a mixture of LoRAs if its down-projections are too large.

Reconstruction: the paper's text and code were not found; the forward is that of two unofficial repositories.
- S starts as the paper's followers do: the d first right singular directions of N random down-projections, with their
  singular values. P_e as nn.Linear's default, B zero.
- d, the experts' rank and the renormalised top-k are choices; alpha / r is the scale.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import (
    Experts,
    LinearRouter,
    Mixture,
    MixtureLinear,
    Note,
    Site,
    in_out_features,
    uniform,
    zeros,
)
from .base import STRICT, Method, balance_loss, balanced_top_k


class SubspaceExperts(Experts):
    """One shared down-projection, and for each expert its coordinates there and an up-projection."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int, subspace: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts = num_experts
        _, sigma, vt = torch.linalg.svd(uniform(base, num_experts * rank, in_features).detach(), full_matrices=False)
        self.lora_S = nn.Parameter(sigma[:subspace, None] * vt[:subspace])
        self.lora_P = uniform(base, num_experts, rank, subspace)
        self.lora_B = zeros(base, num_experts * rank, out_features)

    def down(self) -> Tensor:
        return self.lora_S

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B

    def active_parameters(self, num_active: int) -> int:
        own = self.lora_P.numel() + self.lora_B.numel()
        return self.lora_S.numel() + own * num_active // self.num_experts

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        each = torch.einsum("...d,erd->...er", z, self.lora_P.to(z.dtype))
        return (each * gate.to(each.dtype).unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MALoRA(Method):
    SIZE: ClassVar[str] = "subspace * I + num_experts * (rank * (subspace + O) + I)"
    NOTES = "sums"

    num_experts: PositiveInt = 8
    """N"""
    k: PositiveInt = 2
    """how many experts are active"""
    rank: PositiveInt = 8
    """r, of each expert"""
    subspace: PositiveInt = 16
    """d, the rows of S; at most N r and at most the layer's inputs"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    balance: NonNegativeFloat = 0.001
    """the weight of the balance loss; 0 turns it off"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.num_experts:
            raise ValueError(f"k={self.k} of {self.num_experts} experts: lower k, or add experts")
        if self.subspace > self.num_experts * self.rank:
            raise ValueError(f"subspace={self.subspace} of {self.num_experts * self.rank} ranks in all: lower it")
        return self

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            if self.subspace > in_out_features(base)[0]:
                raise ValueError(f"{name} has {in_out_features(base)[0]} inputs: lower subspace={self.subspace}")
            layers[name] = MixtureLinear(
                base,
                experts=SubspaceExperts(base, self.num_experts, self.rank, self.subspace),
                router=LinearRouter(base, self.num_experts),
                gate=balanced_top_k(self.k, self.balance),
                scale=self.alpha / self.rank,
            )
        return layers

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        return balance_loss(notes, self.balance)
