"""MoLA: Higher Layers Need More LoRA Experts (Gao et al., NAACL Findings 2025).

https://arxiv.org/abs/2402.08562

    y = W x + b + (alpha / r) sum_{i in top-k} g_i B_i A_i x,    g = softmax over the k best of G x
    loss += balance * mean over layers of E sum_e f_e P_e

A LoRA mixture in every layer whose number of experts depends on the depth: few below, many above.

Choose it if a token mixture is wanted and its weights should stand where inputs differ most.

Reconstruction: the code that was read is another group's (MoE-PEFT), with one number of experts for all layers.
- The number by depth is the paper's idea, the default numbers and sizes are choices; the adapted layers are cut into
  equal groups in the model's order.
- The balance loss is on by default (theirs is off), summed over processes, and is 1 at balance (theirs k).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Self

from annotated_types import MinLen
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import LinearRouter, LoRAExperts, Mixture, MixtureLinear, Note
from .base import STRICT, Method, balance_loss, balanced_top_k


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoLA(Method):
    SIZE: ClassVar[str] = "num_experts[l * len(num_experts) // L] * (rank * (I + O) + I)"
    NOTES = "sums"

    num_experts: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (2, 4, 6, 8)
    """E for each group of layers, from the first to the last; (8,) is the same everywhere"""
    k: PositiveInt = 2
    """how many experts are active"""
    rank: PositiveInt = 8
    """r, of each expert"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""
    balance: NonNegativeFloat = 0.001
    """the weight of the balance loss; 0 turns it off"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > min(self.num_experts):
            raise ValueError(f"k={self.k} of {min(self.num_experts)} experts: lower k, or add experts")
        return self

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for i, (name, base) in enumerate(sites.items()):
            count = self.num_experts[i * len(self.num_experts) // len(sites)]
            layers[name] = MixtureLinear(
                base,
                experts=LoRAExperts(base, count, self.rank),
                router=LinearRouter(base, count),
                gate=balanced_top_k(self.k, self.balance),
                scale=self.alpha / self.rank,
            )
        return layers

    def losses(self, notes: Mapping[str, Sequence[Note]]) -> dict[str, Tensor]:
        return balance_loss(notes, self.balance)
