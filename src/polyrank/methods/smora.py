"""SMoRA: Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning (KDD 2026).

Zhao et al. https://arxiv.org/abs/2501.15103

    y = W x + b + (alpha / k) B (g * A x),    g = k p_i / sum_{top-k} p for the k best of p_i + beta_i, else 0
    p = sigmoid(G x) (the released code), or softmax over the chosen of G x (as the paper is said to have it)
    after each step    beta_i += rate * sign(mean count - count_i)

Every rank is an expert of one LoRA. A bias that no gradient trains is added where experts are chosen, so that their
loads become even without a balance loss.

Choose it if a large rank pays but not every token needs all of it.

Deviations from the released code:
- beta chooses but does not weigh (DeepSeek's convention); ``value="biased"`` has the released sum of both.
- beta moves once a step, by the counts of all training forwards since the last one, of all processes (theirs in every
  forward of each process, and once more where activation checkpointing recomputes it); padding does not count.
- A block of ranks is one expert with one count (theirs breaks ties inside a block by each rank's own beta).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Gate, LinearRouter, LoRAExperts, LowRankMixture, Mixture, MixtureLinear, Site, global_sum, place
from .base import STRICT, Method


class LossFreeTopK(Gate):
    """The k best of p + beta; their p, normalised to sum to ``total``."""

    def __init__(self, base: nn.Module, num_experts: int, k: int, total: float, activation: str, value: str) -> None:
        super().__init__()
        self.k, self.total, self.activation, self.value = k, total, activation, value
        self.beta = nn.Parameter(torch.zeros(num_experts, **place(base)), requires_grad=False)  # saved, not trained
        self.counts = torch.zeros_like(self.beta)  # of this step: no part of the adapter

    def forward(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = logits.sigmoid() if self.activation == "sigmoid" else logits
        best = (p + self.beta).topk(self.k, -1).indices
        chosen = (p if self.value == "plain" else p + self.beta).gather(-1, best)
        shares = chosen / chosen.sum(-1, keepdim=True) if self.activation == "sigmoid" else chosen.softmax(-1)
        return torch.zeros_like(p).scatter(-1, best, self.total * shares)

    @torch.no_grad()
    def watch(self, logits: Tensor, weights: Tensor, site: Site) -> None:
        if site.replays:
            return
        chosen, mask = (weights != 0).flatten(0, -2).to(self.counts.dtype), site.mask(weights)
        here = (chosen if mask is None else chosen * mask.reshape(-1, 1).to(chosen)).sum(0)
        self.counts = self.counts.to(here.device) + here

    @torch.no_grad()
    def balance(self, rate: float, counts: Tensor) -> None:
        """counts: of all processes."""
        counts = counts.to(self.beta)
        self.beta += rate * (counts.mean() - counts).sign()
        self.counts = torch.zeros_like(self.beta)

    def num_active(self, num_experts: int) -> int:
        return self.k


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SMoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O) + rank // block * I"

    rank: PositiveInt = 64
    """r, of all experts together"""
    k: PositiveInt = 8
    """how many ranks are active"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / k"""
    block: PositiveInt = 1
    """how many neighbouring ranks make an expert; a divisor of r and of k"""
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    """p, of each rank by itself (the released code) or of the chosen together (the paper)"""
    value: Literal["plain", "biased"] = "plain"
    """whether beta counts in the gate's value too, as in the released code"""
    rate: NonNegativeFloat = 1e-5
    """how far beta moves in a step; 0 leaves the loads alone"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.rank or self.rank % self.block or self.k % self.block:
            raise ValueError(
                f"k={self.k} of rank={self.rank}: k is at most the rank, and block={self.block} divides both"
            )
        return self

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        experts, active = self.rank // self.block, self.k // self.block
        return {
            name: MixtureLinear(
                base,
                experts=LoRAExperts(base, experts, self.block),
                router=LinearRouter(base, experts),
                gate=LossFreeTopK(base, experts, active, active, self.activation, self.value),
                scale=self.alpha / self.k,
            )
            for name, base in sites.items()
        }

    def after_step(self, layers: Mapping[str, Mixture]) -> None:
        found = [layer.gate for layer in layers.values() if isinstance(layer, LowRankMixture)]
        gates = [gate for gate in found if isinstance(gate, LossFreeTopK)]
        if not gates or not self.rate:
            return
        counts = [gate.counts.to(gates[0].counts.device) for gate in gates]
        everywhere = global_sum(torch.cat(counts)).split([len(one) for one in counts])
        for gate, of_all in zip(gates, everywhere, strict=True):
            gate.balance(self.rate, of_all)
