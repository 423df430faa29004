"""MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning (Ren et al., ACL 2024).

https://arxiv.org/abs/2402.17263

    y = W x + b + (alpha / r) concat_{i <= n} (B_i A_i x_i),    x = concat(x_1 .. x_n)

n mini LoRAs of rank r, each from its own slice of the input to its own slice of the output: the change is block
diagonal, of rank up to n r, with the r (I + O) weights of one LoRA of rank r.

Choose it instead of LoRA if the rank matters more than what each rank can see.

Deviations from the released code:
- Merging is right (theirs looks tensors up under the wrong keys and never uses what it merged).
- Any leading dimensions (theirs slices three-dimensional inputs only). A starts as in their code, kaiming uniform.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..mixture import Experts, Mixture, MixtureLinear, Site, in_out_features, uniform, zeros
from .base import STRICT, Method, check_divides


class DiagonalBlocks(Experts):
    """n pairs on the diagonal."""

    def __init__(self, base: nn.Module, num_experts: int, rank: int) -> None:
        super().__init__()
        in_features, out_features = in_out_features(base)
        self.num_experts = num_experts
        self.lora_A = uniform(base, num_experts, rank, in_features // num_experts)
        self.lora_B = zeros(base, num_experts, rank, out_features // num_experts)

    def down(self) -> Tensor:
        return torch.block_diag(*self.lora_A.unbind())

    def up(self, base: nn.Module) -> Tensor:
        return torch.block_diag(*self.lora_B.unbind())

    def core(self, z: Tensor, gate: Tensor | None, site: Site) -> Tensor:
        return z


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MELoRA(Method):
    SIZE: ClassVar[str] = "rank * (I + O)"

    num_experts: PositiveInt = 4
    """n, a divisor of the layers' sizes"""
    rank: PositiveInt = 8
    """r, of each mini LoRA"""
    alpha: PositiveFloat = 16.0
    """the scale is alpha / r"""

    def build(self, sites: Mapping[str, nn.Module], tasks: Sequence[str]) -> dict[str, Mixture]:
        layers: dict[str, Mixture] = {}
        for name, base in sites.items():
            check_divides(self.num_experts, name, base, "num_experts")
            experts = DiagonalBlocks(base, self.num_experts, self.rank)
            layers[name] = MixtureLinear(base, experts=experts, scale=self.alpha / self.rank)
        return layers
