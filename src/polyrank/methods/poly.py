"""Poly: Combining Modular Skills in Multitask Learning (Ponti et al., 2022), with Multi-Head Routing.

https://arxiv.org/abs/2202.13914 and https://arxiv.org/abs/2211.03831 (Caccia et al., NeurIPS 2023)

    y = W x + b + (1 / r) (sum_e g_e B_e) (sum_e g_e A_e) x
    g = p / sum p,    p ~ RelaxedBernoulli(w_t, temperature) in training, sigmoid(w_t) afterwards

An inventory of skills; each task learns which of them it combines. Parameters are mixed, not outputs, so the B of every
skill also works behind every other's A. With S splits, A reads and B writes in S slices, each with its own
mixture, and the r ranks between them are common.

Choose it if the tasks are known, share skills, and each has to leave as a plain model in the end.

Deviations from PEFT's code:
- The mixed matrices are never formed: the experts' thin products are mixed, which is the same and serves mixed batches.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Experts, Gate, Mixture, MixtureLinear, Site, TaskLogits, in_out_features, uniform, zeros
from .base import STRICT, Method, check_divides


class MixedParameters(Experts):
    """Pairs whose As and Bs are mixed apart: (S, E, r) ranks, S slices of the input and output."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int, splits: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank, self.splits = num_experts, rank, splits
        self.lora_A = uniform(base, splits, num_experts * rank, in_features // splits)
        self.lora_B = zeros(base, splits, num_experts * rank, out_features // splits)

    def down(self) -> Tensor:
        return torch.block_diag(*self.lora_A.unbind())

    def up(self, base: nn.Module) -> Tensor:
        return torch.block_diag(*self.lora_B.unbind())

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        assert gate is not None
        gate = gate.to(z.dtype).unsqueeze(-1)  # (..., S E, 1)
        mixed = (gate * z.unflatten(-1, (-1, self.rank))).sum(-2, keepdim=True)  # (..., 1, r)
        return (gate * mixed).flatten(-2)


class RelaxedBernoulli(Gate):
    """Each skill by itself on or off, softly; then shares of their sum, in each split."""

    def __init__(self, num_experts: int, temperature: float) -> None:
        super().__init__()
        self.num_experts, self.temperature = num_experts, temperature

    def forward(self, logits: Tensor) -> Tensor:
        if self.training:
            noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()  # logistic
            logits = (logits + noise) / self.temperature
        p = logits.sigmoid().unflatten(-1, (-1, self.num_experts))  # (..., S, E)
        return (p / (p.sum(-1, keepdim=True) + 1e-12)).flatten(-2)

    def num_active(self, num_experts: int) -> int:
        return num_experts


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Poly(Method):
    SIZE: ClassVar[str] = "num_experts * rank * (I + O) + T * splits * num_experts"

    num_experts: PositiveInt = 4
    """E, the skills"""
    rank: PositiveInt = 8
    """r, of each skill; the scale is 1 / r"""
    splits: PositiveInt = 1
    """S, a divisor of the layers' sizes; more than 1 is Multi-Head Routing"""
    temperature: PositiveFloat = 1.0
    """of the relaxed Bernoulli"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            check_divides(self.splits, name, base, "splits")
            layers[name] = MixtureLinear(
                base,
                experts=MixedParameters(base, self.num_experts, self.rank, self.splits),
                router=TaskLogits(base, len(tasks), self.splits * self.num_experts, bound=1e-3),
                gate=RelaxedBernoulli(self.num_experts, self.temperature),
                scale=1 / self.rank,
            )
        return layers
