"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024).

https://arxiv.org/abs/2402.09353

    y = (m / |V|) * (V x) + b,    V = W + (alpha / r) B A,    |V| the norm of each row (O), outside the gradient

The direction of each row is adapted by a LoRA and its length m by a vector that starts as the rows' own lengths.

Choose it instead of LoRA at small ranks. It computes |V| once a forward, which costs a product of the weight's size.

Deviations from PEFT's code:
- Dropout is 0 (theirs acts on x).
- A layer that is more than its weight (quantised, sharded) is refused: its row lengths would be another weight's.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import (
    LoRAExperts,
    Mixture,
    adapter_dtype,
    base_shrink,
    compute_dtype,
    expand_,
    runs_primitives,
    weight_of,
)
from .base import STRICT, Method, check_plain


class DoRALinear(Mixture):
    """A frozen layer whose rows change in direction and in length."""

    def __init__(self, base: nn.Module, experts: LoRAExperts, scale: float) -> None:
        super().__init__(base)
        self.experts, self.scale = experts, scale
        self.magnitude = nn.Parameter(self._direction().norm(dim=1))  # (O,)

    def _direction(self) -> Tensor:
        """V (O, I)."""
        weight = weight_of(self.base).detach().to(adapter_dtype(self.base))
        return torch.addmm(weight, self.experts.lora_B.t(), self.experts.lora_A, alpha=self.scale)

    def _lengths(self) -> Tensor:
        return self.magnitude / self._direction().detach().norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if runs_primitives(self.base):
            y, z = base_shrink(x, weight_of(self.base), None, self.experts.lora_A)
            y = expand_(y, z * self.scale, self.experts.lora_B)
        else:  # hooked: the base runs as it is
            dtype = compute_dtype(x)
            z = F.linear(x, self.experts.lora_A.to(dtype))
            y = self.base(x) + F.linear(z * self.scale, self.experts.lora_B.t().to(dtype))
            y = y if self.bias is None else y - self.bias.to(y.dtype)
        y = y * self._lengths().to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def task_weight(self, task: int) -> Tensor:
        return self._lengths().unsqueeze(1) * self._direction()

    @property
    def stands_for_base(self) -> bool:
        return False

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    def task_lora(self, task: int) -> tuple[Tensor, Tensor]:
        raise ValueError(
            f"{self.site.name}: DoRA rescales every row of the weight, so its delta has full rank and is no LoRA; "
            "merge it into a dense weight"
        )

    def active_parameters(self) -> int:
        return sum(p.numel() for p in self.experts.parameters()) + self.magnitude.numel()

    def flops_per_token(self) -> int:
        return 2 * (self.in_features * self.out_features + sum(p.numel() for p in self.experts.parameters()))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O) + O"

    rank: PositiveInt = 8
    """r"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            check_plain(name, base, "measures the rows of the weight itself")
            layers[name] = DoRALinear(base, LoRAExperts(base, 1, self.rank), self.alpha / self.rank)
        return layers
