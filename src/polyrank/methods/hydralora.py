"""HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning (Tian et al., NeurIPS 2024).

https://arxiv.org/abs/2404.19245

    y = W x + b + (alpha / r) sum_{i <= N} g_i B_i A x,    g = softmax(G x)

One A for all experts, N alternatives of B: what inputs have in common is learnt once.

Choose it if the tasks are not known at inference and a token mixture should stay small.

Deviations from the released code:
- Dropout is 0 (theirs acts on x). Their N is found by clustering the data; here it is a field.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from ..mixture import LinearRouter, Mixture, MixtureLinear, SharedDownExperts, Softmax
from .base import STRICT, Method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HydraLoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + num_experts * O) + num_experts * I"

    num_experts: PositiveInt = 4
    """N"""
    rank: PositiveInt = 4
    """r"""
    alpha: PositiveFloat = 32.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        return {
            name: MixtureLinear(
                base,
                experts=SharedDownExperts(base, self.num_experts, self.rank, block=self.rank),
                router=LinearRouter(base, self.num_experts),
                gate=Softmax(),
                scale=self.alpha / self.rank,
            )
            for name, base in sites.items()
        }
