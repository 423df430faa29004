"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022). https://arxiv.org/abs/2106.09685

    y = W x + b + (alpha / r) B A x          one pair for all tasks: no router

Deviations from the released code: dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from ..mixture import LoRAExperts, Mixture, MixtureLinear
from .base import STRICT, Method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRA(Method):
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base, experts=LoRAExperts(base, num_experts=1, rank=self.rank), scale=self.alpha / self.rank
            )
            for name, base in sites.items()
        }
