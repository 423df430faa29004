"""MultiLoRA: Democratizing LoRA for Better Multi-Task Learning (Wang et al., 2023).

https://arxiv.org/abs/2311.11501

    y = W x + b + (alpha / r) sum_{i <= N} c_i * (B_i A_i x),    c_i (O)

N parallel pairs, none of which dominates: both factors start random, and a scale for each output that starts at zero
keeps step 0 at the base.

Choose it instead of LoRA for many tasks, if one weight has to serve all of them.

Deviations from the released code (that in MTL-LoRA's repository):
- Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Experts, Mixture, MixtureLinear, Site, in_out_features, uniform, zeros
from .base import STRICT, Method


class ScaledExperts(Experts):
    """Parallel pairs whose outputs have a scale for each feature."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts, self.rank = num_experts, rank
        self.lora_A = uniform(base, num_experts * rank, in_features)
        self.lora_B = uniform(base, num_experts * rank, out_features, bound=rank**-0.5)
        self.scales = zeros(base, num_experts, out_features)

    def down(self) -> Tensor:
        return self.lora_A

    def up(self, base: nn.Module) -> Tensor:
        return self.lora_B * self.scales.repeat_interleave(self.rank, 0)

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        return z


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MultiLoRA(Method):
    SIZE: ClassVar[str] = "num_experts * (rank * (I + O) + O)"

    num_experts: PositiveInt = 3
    """N"""
    rank: PositiveInt = 8
    """r, of each pair"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base, experts=ScaledExperts(base, self.num_experts, self.rank), scale=self.alpha / self.rank
            )
            for name, base in sites.items()
        }
