"""Experts own the thin maps A and B, and how a gate acts on the ranks between them."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .base import in_out_features, weight_of


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """fp32 master weights whatever the base is stored in; fp64 where the base is."""
    return torch.float64 if weight_of(base).dtype == torch.float64 else torch.float32


class Experts(nn.Module, ABC):
    """What every parametrisation of the experts provides."""

    num_experts: int

    @abstractmethod
    def down(self) -> Tensor:
        """A: the rows of all experts, (R, I)."""

    @abstractmethod
    def up(self, base: nn.Module) -> Tensor:
        """B: (R', O). ``base`` is for experts that stand on the frozen weight."""

    @abstractmethod
    def core(self, z: Tensor, gate: Tensor | None) -> Tensor:
        """q = C(gate) z: (..., R) -> (..., R'), linear in z. ``gate`` is (..., E), or None where nothing is gated."""


class LoRAExperts(Experts):
    """E independent pairs (A_e, B_e) of one rank, stacked. A as nn.Linear's default, B zero: starts as the base."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank = num_experts, rank
        place = {"device": weight_of(base).device, "dtype": adapter_dtype(base)}
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform(a=sqrt(5)), LoRA's own
        self.lora_A = nn.Parameter(torch.empty(num_experts * rank, in_features, **place).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(num_experts * rank, out_features, **place))

    def down(self) -> Tensor:
        return self.lora_A

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B

    def core(self, z: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return z
        gate = gate.to(z.dtype)
        if self.rank == 1:
            return z * gate
        return (z.unflatten(-1, (self.num_experts, self.rank)) * gate.unsqueeze(-1)).flatten(-2)
