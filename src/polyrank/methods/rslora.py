"""rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023).

https://arxiv.org/abs/2312.03732

    y = W x + b + (alpha / sqrt(r)) B A x

LoRA with another scale, under which the update neither vanishes nor explodes as the rank grows.

Choose it instead of LoRA at ranks of 32 and more.

Deviations from PEFT's code:
- Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from ..mixture import LoRAExperts, Mixture, MixtureLinear
from .base import STRICT, Method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RsLoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O)"

    rank: PositiveInt = 32
    """r"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / sqrt(r)"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(base, experts=LoRAExperts(base, 1, self.rank), scale=self.alpha / self.rank**0.5)
            for name, base in sites.items()
        }
