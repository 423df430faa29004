"""MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning (Wang et al., NAACL 2025).

https://arxiv.org/abs/2406.09044        W = U diag(sigma) V'

    y = (W - s B_0 A_0) x + b + s B A x,    s = alpha / r
    A starts as A_0 = sqrt(Sigma_m / s) V_m',    B as B_0 = U_m sqrt(Sigma_m / s),    m the r smallest directions

PiSSA's opposite: what the base knows stands in the large directions, so the small ones are trained.

Choose it instead of LoRA if the model must not lose what it could do.

Deviations from the released code:
- The base weight stays what it is: B_0 A_0 is subtracted in the forward, which is the same function (as in PiSSA here).
- The smallest directions are those above rounding: a direction whose sigma is 0 starts with A_0 = B_0 = 0, and no
  gradient would ever move it.
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
class MiLoRA(Method):
    SIZE: ClassVar[str] = "min(rank, K) * (I + O)"

    rank: PositiveInt = 8
    """r"""
    alpha: PositiveFloat = 8.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        def layer(base: nn.Module, factors: Factors) -> Mixture:
            low = factors.last(self.rank)
            experts = SingularExperts(base, low.u, low.sigma, low.vt, self.alpha / self.rank)
            return MixtureLinear(base, experts=experts, scale=self.alpha / self.rank)

        return singular_layers(sites, layer, closed=True)
