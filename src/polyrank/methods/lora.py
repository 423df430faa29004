"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022).

https://arxiv.org/abs/2106.09685

    y = W x + b + (alpha / r) B A x

One pair for all tasks, and no router: no `task_ids` are needed.

Choose it as the baseline that a mixture has to beat, or where the task of a sample is not known.

Deviations from the released code:
- Dropout is 0 (theirs acts on x): `dropout` goes around this or another method, `at: input` is theirs.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from ..mixture import LoRAExperts, Mixture, MixtureLinear
from .base import STRICT, Method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O)"

    rank: PositiveInt = 8
    """r"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(base, experts=LoRAExperts(base, 1, self.rank), scale=self.alpha / self.rank)
            for name, base in sites.items()
        }
