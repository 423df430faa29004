"""MoSLoRA: Mixture-of-Subspaces in Low-Rank Adaptation (Wu et al., EMNLP 2024).

https://arxiv.org/abs/2406.11909

    y = W x + b + (alpha / r) B M A x,    M (r, r)

A trained mixer between the two thin maps: every row of A can feed every column of B.

Choose it instead of LoRA at the same rank: the mixer costs r^2 weights and merges away.

Deviations from the released code:
- Dropout is 0 (theirs acts on x).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from ..mixture import Mixture, MixtureLinear, Pairs, Site, uniform
from .base import STRICT, Method


class MixedRanks(Pairs):
    """One pair and a mixer between A and B."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__(base, 1, rank)
        self.mixer = uniform(base, rank, rank)

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        return F.linear(z, self.mixer.to(z.dtype))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoSLoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O) + rank**2"

    rank: PositiveInt = 16
    """r"""
    alpha: PositiveFloat = 32.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(base, experts=MixedRanks(base, self.rank), scale=self.alpha / self.rank)
            for name, base in sites.items()
        }
