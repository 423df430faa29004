"""PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models (NeurIPS 2024).

Meng et al. https://arxiv.org/abs/2404.02948        W = U diag(sigma) V'

    y = (W - s B_0 A_0) x + b + s B A x,    s = alpha / r
    A starts as A_0 = sqrt(Sigma_r / s) V_r',    B as B_0 = U_r sqrt(Sigma_r / s)

LoRA that starts at the r largest singular directions of the weight, so that they, and not noise, are trained first.

Choose it instead of LoRA if training is short.

Deviations from the released code:
- The base weight stays what it is: B_0 A_0 is subtracted in the forward, which is the same function. So the adapter's
  delta is a LoRA of rank 2 r, and a removed adapter leaves the base bit for bit.
- The factors come from an exact SVD (theirs may be randomised), and r is at most the weight's numerical rank.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from ..mixture import Mixture, MixtureLinear, SingularExperts
from ..svd import Factors
from .base import STRICT, Method, singular_layers


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PiSSA(Method):
    SIZE: ClassVar[str] = "min(rank, K) * (I + O)"

    rank: PositiveInt = 8
    """r"""
    alpha: PositiveFloat = 8.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        def layer(base: nn.Module, factors: Factors) -> Mixture:
            top = factors.first(self.rank)
            experts = SingularExperts(base, top.u, top.sigma, top.vt, self.alpha / self.rank)
            return MixtureLinear(base, experts=experts, scale=self.alpha / self.rank)

        return singular_layers(sites, layer, closed=True)
